// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/input.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

namespace minivmm::nbd {

Input::~Input() {
  // The session has waited for its writes: no block is pinned.
  if (block_ != nullptr) dispose(block_);
}

InputBlock* Input::new_block() {
  auto* const out = new InputBlock;
  // A small block is every client's right; large ones are paid for.
  const bool large = large_ && budget_.try_acquire_spare(kLargeBlock);
  if (large) out->charge = kLargeBlock;
  try {
    out->memory = resources_.buffers().take(large ? kLargeBlock : kSmallBlock);
  } catch (...) {
    if (out->charge > 0) budget_.release(out->charge);
    delete out;
    throw;
  }
  return out;
}

void Input::dispose(InputBlock* block) noexcept {
  resources_.buffers().give_back(std::move(block->memory));
  if (block->charge > 0) budget_.release(block->charge);
  delete block;
}

// Makes block_ one with room behind end_. False: too many are in use.
bool Input::make_room() {
  const size_t left = size();
  const bool pinned = block_ != nullptr && block_->writes > 0;
  const size_t least = large_ ? kLargeBlock : kSmallBlock;
  if (block_ != nullptr && !pinned && block_->memory.size() >= least) {
    std::memmove(block_->memory.data(), data(), left);
  } else {
    if (pinned && abandoned_ == kMaxAbandoned) return false;
    InputBlock* const fresh = new_block();
    std::memcpy(fresh->memory.data(), data(), left);
    if (pinned) {
      block_->abandoned = true;
      ++abandoned_;
    } else if (block_ != nullptr) {
      dispose(block_);
    }
    block_ = fresh;
  }
  begin_ = 0;
  end_ = left;
  return true;
}

iovec Input::room(size_t limit) {
  idle_ = false;
  // What is left of a header moves to the front of the block where that costs nothing.
  constexpr size_t kWorthwhile = 4096;
  const bool at_front = block_ != nullptr && (begin_ == 0 || block_->writes > 0);
  const size_t behind = block_ != nullptr ? block_->memory.size() - end_ : 0;
  const bool grow = block_ != nullptr && large_ && block_->memory.size() < kLargeBlock;
  if (!at_front || grow || behind < std::min(limit, kWorthwhile)) {
    if (!make_room()) return {nullptr, 0};
  }
  return {block_->memory.data() + end_, std::min(limit, block_->memory.size() - end_)};
}

void Input::received(size_t bytes) noexcept {
  // Filled to the brim: there was more to come. Much less than a small block: there was not.
  if (bytes >= kSmallBlock || (block_ != nullptr && end_ + bytes == block_->memory.size())) {
    large_ = true;
  } else if (bytes < kSmallBlock / 2) {
    large_ = false;
  }
  end_ += bytes;
}

void Input::idle() noexcept {
  idle_ = true;
  if (block_ == nullptr || block_->writes > 0 || size() > carried_.size()) return;
  const size_t left = size();
  std::memcpy(carried_.data(), data(), left);
  dispose(block_);
  block_ = nullptr;
  begin_ = 0;
  end_ = left;
}

void Input::park() noexcept {
  if (block_ == nullptr || block_->writes > 0 || size() > block_->memory.size() / 2) return;
  if (size() <= carried_.size()) {
    idle();
    idle_ = false;
    return;
  }
  try {
    auto fresh = std::make_unique<InputBlock>();
    fresh->memory = base::Pages(size());
    std::memcpy(fresh->memory.data(), data(), size());
    end_ = size();
    begin_ = 0;
    dispose(std::exchange(block_, fresh.release()));
  } catch (const std::bad_alloc&) {
    // It stays where it is.
  }
}

InputBlock& Input::pin() noexcept {
  ++block_->writes;
  return *block_;
}

void Input::release(InputBlock& block) noexcept {
  if (--block.writes > 0) return;
  if (block.abandoned) {
    --abandoned_;
    dispose(&block);
  } else if (idle_) {
    idle();
  }
}

}  // namespace minivmm::nbd
