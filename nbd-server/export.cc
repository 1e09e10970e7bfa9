// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/export.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "nbd-server/option_data.h"

namespace minivmm::nbd {

namespace {

std::string clone_name(const Export& origin, const std::string& client) {
  return client.empty() ? origin.name() : fmt::format("{}/{}", origin.name(), client);
}

}  // namespace

Export::Export(std::shared_ptr<Export> origin, const std::string& client, block::Handle handle)
    : name_(clone_name(*origin, client)),
      options_(origin->options_),
      origin_(std::move(origin)),
      client_(client),
      handle_(std::move(handle)) {}

Export::Export(std::string name, block::Handle handle, ExportOptions options,
               std::shared_ptr<CloneSource> clones)
    : name_(std::move(name)),
      options_(std::move(options)),
      clones_(std::make_unique<Clones>(std::move(clones))),
      handle_(std::move(handle)) {}

Export::Export(std::string name, block::Handle handle, ExportOptions options)
    : name_(std::move(name)), options_(std::move(options)), handle_(std::move(handle)) {
  if (options_.writable && !handle_.writable()) {
    throw base::Error(EROFS, fmt::format("NBD export '{}' cannot be writable: {} was attached for "
                                         "reading only",
                                         name_, handle_.describe()));
  }
  check_contexts();
}

// Bitmaps that are asked for are there and of use.
void Export::check_contexts() {
  if (!options_.contexts) return;
  constexpr std::string_view kBitmap = "qemu:dirty-bitmap:";
  const std::vector<block::DirtyBitmaps::Info> there = handle_.dirty_bitmaps();
  for (const std::string& wanted : *options_.contexts) {
    if (!wanted.starts_with(kBitmap)) continue;
    const std::string_view name = std::string_view(wanted).substr(kBitmap.size());
    const auto found = std::find_if(there.begin(), there.end(),
                                    [&](const auto& each) { return each.name == name; });
    if (found == there.end()) {
      throw base::Error(ENOENT, fmt::format("Bitmap '{}' is not found", name));
    }
    if (found->inconsistent) {
      throw base::Error(EINVAL,
                        fmt::format("Bitmap '{}' is inconsistent and cannot be used", name));
    }
  }
}

bool Export::offers(std::string_view context) const noexcept {
  const auto& chosen = options_.contexts;
  return !chosen || context == "base:allocation" ||
         std::find(chosen->begin(), chosen->end(), context) != chosen->end();
}

bool Export::allows(std::string_view client) const noexcept {
  if (options_.allow.empty()) return true;
  if (client.empty()) return false;
  return std::any_of(options_.allow.begin(), options_.allow.end(),
                     [client](const std::string& each) { return each == "*" || each == client; });
}

void Export::limit_memory(Budgets& all) {
  if (options_.memory == 0) return;
  memory_ = std::make_unique<Budgets>(std::clamp(options_.memory, kMinMemory, all.total()), &all);
}

uint16_t Export::transmission_flags(wire::Headers headers) const noexcept {
  // One graph serves every connection, so a flush on one covers what was written on all.
  unsigned flags =
      wire::kHasFlags | wire::kSendFlush | wire::kSendFua | wire::kCanMultiConn | wire::kSendCache;
  if (!options_.multi_conn) flags &= ~unsigned{wire::kCanMultiConn};
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
  if (users_.closed() || !lookers_.enter()) return fmt::format("NBD export '{}': closing", name_);
  const char* const how = cloned() ? "a clone for each" : writable() ? "writable" : "read-only";
  std::string out;
  try {
    out = fmt::format("NBD export '{}': {}, {} bytes, {}, {} clients", name_, handle_.describe(),
                      size(), how, clients());
  } catch (...) {
    lookers_.leave();
    throw;
  }
  lookers_.leave();
  return out;
}

void Export::close() {
  lookers_.close();
  handle_.close();
}

ExportUse::ExportUse(std::shared_ptr<Export> target, std::string client)
    : client_(std::move(client)) {
  if (target && target->users_.enter()) target_ = std::move(target);
}

ExportUse& ExportUse::operator=(ExportUse&& other) noexcept {
  if (this != &other) {
    leave();
    target_ = std::move(other.target_);
    client_ = std::move(other.client_);
  }
  return *this;
}

// The gate that a user of a clone is inside of is that of the origin.
void ExportUse::leave() noexcept {
  if (!target_) return;
  const std::shared_ptr<Export> used = std::move(target_);
  if (used->origin()) used->origin()->clones_->give_back(used);
  (used->origin() ? *used->origin() : *used).users_.leave();
}

void ExportUse::open_clone() {
  if (target_->cloned()) target_ = target_->clones_->take(target_, client_);
}

std::string ExportUse::name() const {
  return target_->cloned() ? clone_name(*target_, client_) : target_->name();
}

// The disk is nobody else's: another connection would get another one.
bool ExportUse::of_one_connection() const noexcept {
  return (target_->cloned() || target_->origin()) && client_.empty();
}

uint16_t ExportUse::transmission_flags(wire::Headers headers) const noexcept {
  const unsigned flags = target_->transmission_flags(headers);
  return static_cast<uint16_t>(of_one_connection() ? flags & ~unsigned{wire::kCanMultiConn}
                                                   : flags);
}

ExportSeat::ExportSeat(const std::shared_ptr<Export>& target) {
  const unsigned most = target->options_.max_connections;
  const unsigned before = target->sessions_.fetch_add(1, std::memory_order_relaxed);
  if (most == 0 || before < most) {
    target_ = target;
  } else {
    target->sessions_.fetch_sub(1, std::memory_order_relaxed);
  }
}

ExportSeat& ExportSeat::operator=(ExportSeat&& other) noexcept {
  if (this != &other) {
    leave();
    target_ = std::move(other.target_);
  }
  return *this;
}

void ExportSeat::leave() noexcept {
  if (target_) target_->sessions_.fetch_sub(1, std::memory_order_relaxed);
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
  return find_clone(name);
}

ExportUse ExportTable::find_clone(std::string_view name) const {
  const size_t slash = name.rfind('/');
  if (slash == std::string_view::npos || !is_client_name(name.substr(slash + 1))) return {};
  const auto found = exports_.find(name.substr(0, slash));
  if (found == exports_.end() || !found->second->cloned()) return {};
  return ExportUse(found->second, std::string(name.substr(slash + 1)));
}

std::vector<std::shared_ptr<Export>> ExportTable::all() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Export>> out;
  out.reserve(exports_.size());
  for (const auto& entry : exports_) out.push_back(entry.second);
  return out;
}

std::shared_ptr<Export> ExportTable::remove(const std::string& name, bool only_unused) {
  // Who begins to use it does so under the mutex, too.
  const std::lock_guard lock(mutex_);
  const auto found = exports_.find(name);
  if (found == exports_.end()) return nullptr;
  if (const uint64_t clients = found->second->clients(); only_unused && clients > 0) {
    throw base::Error(EBUSY, fmt::format("NBD export '{}' is in use by {} clients", name, clients));
  }
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
