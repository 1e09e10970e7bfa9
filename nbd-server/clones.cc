// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/clones.h"

#include <algorithm>
#include <mutex>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "nbd-server/export.h"

namespace minivmm::nbd {

bool is_client_name(std::string_view name) noexcept {
  constexpr size_t kMaxName = 64;
  const auto fits = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  };
  return !name.empty() && name.size() <= kMaxName && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), fits);
}

std::shared_ptr<Clones::Named> Clones::enter(const std::string& client) {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<Named>& named = named_[client];
  if (!named) named = std::make_shared<Named>();
  ++named->interested;
  return named;
}

void Clones::leave(const std::string& client) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = named_.find(client);
  if (--found->second->interested == 0) named_.erase(found);
}

std::shared_ptr<Export> Clones::take(const std::shared_ptr<Export>& origin,
                                     const std::string& client) {
  if (client.empty()) return make(origin, client);
  const std::shared_ptr<Named> named = enter(client);
  const std::lock_guard changing(named->changing);
  try {
    if (!named->clone) named->clone = make(origin, client);
  } catch (...) {
    leave(client);
    throw;
  }
  ++named->users;
  return named->clone;
}

std::shared_ptr<Export> Clones::make(const std::shared_ptr<Export>& origin,
                                     const std::string& client) {
  block::Handle handle = source_->open(client);
  return std::make_shared<Export>(origin, client, std::move(handle));
}

void Clones::give_back(std::shared_ptr<Export> clone) noexcept {
  const std::string& client = clone->client();
  if (client.empty()) return close(*clone);
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Named> named = named_.find(client)->second;
  lock.unlock();
  {
    const std::lock_guard changing(named->changing);
    if (--named->users == 0) {
      close(*clone);
      named->clone.reset();
    }
  }
  leave(client);
}

void Clones::close(Export& clone) noexcept {
  try {
    source_->close(std::move(clone.handle()), clone.client());
  } catch (const std::exception& e) {
    base::log_error("NBD export '{}': the end of a clone: {}", clone.name(), e.what());
  }
}

}  // namespace minivmm::nbd
