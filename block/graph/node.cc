// SPDX-License-Identifier: Apache-2.0
#include "block/graph/node.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/edge.h"

namespace minivmm::block {

using base::Error;

Node::Node(std::string node_name, const char* driver, bool read_only)
    : name_(std::move(node_name)), driver_(driver), read_only_(read_only) {}

Node::~Node() = default;

std::string Node::describe() const {
  const std::string file = filename();
  // Nobody chose a name that begins so.
  if (!file.empty() && name_.starts_with('#')) return fmt::format("{} ({})", file, driver_);
  return file.empty() ? fmt::format("'{}' ({})", name_, driver_)
                      : fmt::format("'{}' ({}, {})", name_, driver_, file);
}

void Node::grow_size(uint64_t size) noexcept {
  uint64_t now = size_.load(std::memory_order_relaxed);
  while (now < size && !size_.compare_exchange_weak(now, size, std::memory_order_acq_rel)) {
  }
}

void Node::add_before_write(BeforeWrite& hook) { before_write_.push_back(&hook); }

void Node::remove_before_write(BeforeWrite& hook) noexcept { std::erase(before_write_, &hook); }

void Node::run_before_write(uint64_t offset, uint64_t length, IoSpan data) {
  for (BeforeWrite* hook : before_write_) hook->before_write(offset, length, data);
}

void Node::add_watcher(const Edge& edge, std::shared_ptr<ContentWatcher> watcher) {
  const std::lock_guard lock(watchers_mutex_);
  std::erase_if(watchers_, [&](const auto& entry) { return entry.first == &edge; });
  watchers_.emplace_back(&edge, std::move(watcher));
  count_watchers();
}

void Node::count_watchers() noexcept {
  const bool any = std::any_of(watchers_.begin(), watchers_.end(),
                               [](const auto& entry) { return entry.second->wants_content(); });
  watched_.store(any, std::memory_order_seq_cst);
}

std::shared_ptr<Node::ContentWatcher> Node::remove_watcher(const Edge& edge) noexcept {
  std::shared_ptr<ContentWatcher> removed;
  const std::lock_guard lock(watchers_mutex_);
  for (auto it = watchers_.begin(); it != watchers_.end(); ++it) {
    if (it->first != &edge) continue;
    removed = std::move(it->second);
    watchers_.erase(it);
    break;
  }
  count_watchers();
  return removed;
}

void Node::content_changed(const Edge& by, uint64_t offset, uint64_t length) noexcept {
  // They may suspend, and may be removed meanwhile.
  std::unique_lock lock(watchers_mutex_);
  const auto watchers = watchers_;
  lock.unlock();
  for (const auto& [edge, watcher] : watchers) {
    if (edge != &by) watcher->content_changed(offset, length);
  }
}

void Node::size_changed(uint64_t old_size, uint64_t new_size) noexcept {
  std::unique_lock lock(watchers_mutex_);
  const auto watchers = watchers_;
  lock.unlock();
  for (const auto& [edge, watcher] : watchers) watcher->size_changed(old_size, new_size);
}

// Copies of what lies behind a nearer end are not to be seen again.
void Node::ContentWatcher::size_changed(uint64_t old_size, uint64_t new_size) noexcept {
  const uint64_t first = std::min(old_size, new_size);
  content_changed(first, std::max(old_size, new_size) - first);
}

void Node::attach(Edge& edge) {
  const Permissions wanted = edge.permissions();
  if (wanted.uses != 0 && read_only_) {
    throw Error(EROFS, fmt::format("{}: {} needs to {} it, but it is read-only", describe(),
                                   edge.user(), permission_words(wanted.uses)));
  }
  const std::lock_guard lock(users_mutex_);
  for (const Edge* other : users_) {
    const Permissions theirs = other->permissions();
    const auto we_break = static_cast<uint8_t>(wanted.uses & ~theirs.shares);
    if (we_break != 0) {
      throw Error(EBUSY,
                  fmt::format("{}: {} would {} it, which {} does not allow while it uses it",
                              describe(), edge.user(), permission_words(we_break), other->user()));
    }
    const auto they_break = static_cast<uint8_t>(theirs.uses & ~wanted.shares);
    if (they_break != 0) {
      throw Error(EBUSY,
                  fmt::format("{}: {} needs that nobody else may {} it, which {} does", describe(),
                              edge.user(), permission_words(they_break), other->user()));
    }
  }
  users_.push_back(&edge);
}

void Node::detach(Edge& edge) noexcept {
  const std::lock_guard lock(users_mutex_);
  std::erase(users_, &edge);
}

std::vector<std::string> Node::users() const {
  const std::lock_guard lock(users_mutex_);
  std::vector<std::string> out;
  out.reserve(users_.size());
  for (const Edge* edge : users_) out.push_back(edge->user());
  return out;
}

void Node::driver_write_zeroes(uint64_t, uint64_t, ZeroFlags) {
  throw Error(ENOTSUP, "write zeroes: not supported");
}

void Node::driver_discard(uint64_t, uint64_t) {}

BlockStatus Node::driver_block_status(uint64_t, uint64_t length) {
  return {.length = length, .data = true, .allocated = true};
}

void Node::driver_truncate(uint64_t) {
  throw Error(ENOTSUP, fmt::format("{}: cannot be resized", describe()));
}

void Node::driver_preallocate(uint64_t offset, uint64_t length, Preallocation how) {
  if (how != Preallocation::kFalloc) {
    throw Error(ENOTSUP, fmt::format("{}: has no metadata to preallocate", describe()));
  }
  driver_write_zeroes(offset, length, {.may_unmap = false});
}

void Node::driver_copy_range(uint64_t, uint64_t, Edge&, uint64_t) {
  throw Error(ENOTSUP, "copy range: not supported");
}

void Node::driver_copy_out(uint64_t offset, uint64_t length, const TakePiece& take) {
  take(*this, offset, length);
}

void Node::driver_write_compressed(uint64_t, IoSpan) {
  throw Error(ENOTSUP, fmt::format("{}: does not store compressed data", describe()));
}

void Node::driver_prefetch(uint64_t, uint64_t) {}

}  // namespace minivmm::block
