// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/export.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "nbd-server/option_data.h"

namespace minivmm::nbd {

Export::Export(std::string name, block::Handle handle, ExportOptions options)
    : name_(std::move(name)), options_(std::move(options)), handle_(std::move(handle)) {
  if (options_.writable && !handle_.writable()) {
    throw base::Error(EROFS, fmt::format("NBD export '{}' cannot be writable: {} was attached for "
                                         "reading only",
                                         name_, handle_.describe()));
  }
}

bool Export::allows(std::string_view client) const noexcept {
  if (options_.allow.empty()) return true;
  if (client.empty()) return false;
  return std::any_of(options_.allow.begin(), options_.allow.end(),
                     [client](const std::string& each) { return each == "*" || each == client; });
}

uint16_t Export::transmission_flags(wire::Headers headers) const noexcept {
  // One graph serves every connection, so a flush on one covers what was written on all.
  unsigned flags =
      wire::kHasFlags | wire::kSendFlush | wire::kSendFua | wire::kCanMultiConn | wire::kSendCache;
  if (headers != wire::Headers::kSimple) flags |= wire::kSendDf;
  if (headers == wire::Headers::kExtended) flags |= wire::kBlockStatusPayload;
  if (writable()) {
    flags |= wire::kSendTrim | wire::kSendWriteZeroes | wire::kSendFastZero;
  } else {
    flags |= wire::kReadOnly;
  }
  return static_cast<uint16_t>(flags);
}

uint32_t Export::preferred_block() const noexcept {
  const block::Limits& limits = handle_.limits();
  const uint32_t wanted = std::max({limits.optimal_io, limits.request_alignment, uint32_t{4096}});
  return std::min(std::bit_floor(wanted), wire::kMaxPayload);
}

std::string Export::describe() const {
  // Holds the handle for as long as it is looked at.
  if (!users_.enter()) return fmt::format("NBD export '{}': closing", name_);
  const std::string out =
      fmt::format("NBD export '{}': {}, {} bytes, {}, {} clients", name_, handle_.describe(),
                  size(), writable() ? "writable" : "read-only", users_.inside() - 1);
  users_.leave();
  return out;
}

ExportUse::ExportUse(std::shared_ptr<Export> target) {
  if (target && target->users_.enter()) target_ = std::move(target);
}

ExportUse& ExportUse::operator=(ExportUse&& other) noexcept {
  if (this != &other) {
    leave();
    target_ = std::move(other.target_);
  }
  return *this;
}

void ExportUse::leave() noexcept {
  if (target_) target_->users_.leave();
  target_.reset();
}

void ExportTable::add(std::shared_ptr<Export> added) {
  for (const std::string& text : {added->name(), added->description()}) {
    (void)wire::check_string(std::as_bytes(std::span(text)), "the name or description");
  }
  const std::lock_guard lock(mutex_);
  if (closed_) throw base::Error(ESHUTDOWN, "the NBD server is shutting down");
  const std::string& name = added->name();
  if (!exports_.try_emplace(name, added).second) {
    throw base::Error(EEXIST, fmt::format("there is an NBD export '{}' already: give another "
                                          "name",
                                          name));
  }
}

ExportUse ExportTable::find(std::string_view name) const {
  const std::lock_guard lock(mutex_);
  const auto found = exports_.find(name);
  if (found != exports_.end()) return ExportUse(found->second);
  if (name.empty() && exports_.size() == 1) return ExportUse(exports_.begin()->second);
  return {};
}

std::vector<std::shared_ptr<Export>> ExportTable::all() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Export>> out;
  out.reserve(exports_.size());
  for (const auto& entry : exports_) out.push_back(entry.second);
  return out;
}

std::shared_ptr<Export> ExportTable::remove(const std::string& name) {
  const std::lock_guard lock(mutex_);
  const auto found = exports_.find(name);
  if (found == exports_.end()) return nullptr;
  auto out = std::move(found->second);
  exports_.erase(found);
  return out;
}

std::vector<std::shared_ptr<Export>> ExportTable::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  std::vector<std::shared_ptr<Export>> out;
  for (auto& entry : exports_) out.push_back(std::move(entry.second));
  exports_.clear();
  return out;
}

}  // namespace minivmm::nbd
