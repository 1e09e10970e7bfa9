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

std::shared_ptr<Export> Clones::take(const std::shared_ptr<Export>& origin,
                                     const std::string& client) {
  if (client.empty()) return make(origin, client);
  const std::lock_guard lock(mutex_);
  const auto found = named_.find(client);
  if (found != named_.end()) {
    ++found->second.users;
    return found->second.clone;
  }
  std::shared_ptr<Export> clone = make(origin, client);
  named_.emplace(client, Shared{clone, 1});
  return clone;
}

std::shared_ptr<Export> Clones::make(const std::shared_ptr<Export>& origin,
                                     const std::string& client) {
  block::Handle handle = source_->open(client);
  return std::make_shared<Export>(origin, client, std::move(handle));
}

void Clones::give_back(std::shared_ptr<Export> clone) noexcept {
  const std::string& client = clone->client();
  if (client.empty()) return close(*clone);
  const std::lock_guard lock(mutex_);
  const auto found = named_.find(client);
  if (--found->second.users > 0) return;
  close(*clone);
  named_.erase(found);
}

void Clones::close(Export& clone) noexcept {
  try {
    source_->close(std::move(clone.handle()), clone.client());
  } catch (const std::exception& e) {
    base::log_error("NBD export '{}': the end of a clone: {}", clone.name(), e.what());
  }
}

}  // namespace minivmm::nbd
