// SPDX-License-Identifier: Apache-2.0
// What has been received from a client and not been consumed. The connection's loop only.
//
// One receive brings many requests and the payloads of small writes, which are then written from
// where they lie: such a block is kept until its last write has ended. A client that is silent
// holds no block, only the beginning of a header that it may have sent.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/pages.h"
#include "nbd-server/budget.h"
#include "nbd-server/resources.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd {

struct InputBlock {
  base::Pages memory;
  unsigned writes = 0;     // that read from it
  uint64_t charge = 0;     // taken from the budget
  bool abandoned = false;  // no longer received into: goes with its last write
};

class Input {
 public:
  static constexpr size_t kSmallBlock = size_t{16} << 10;
  static constexpr size_t kLargeBlock = size_t{256} << 10;

  Input(Resources& resources, Budget& budget) noexcept : resources_(resources), budget_(budget) {}
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;
  ~Input();

  size_t size() const noexcept { return end_ - begin_; }
  const std::byte* data() const noexcept { return memory() + begin_; }
  void consume(size_t bytes) noexcept { begin_ += bytes; }

  // Room to receive into, at most `limit` bytes of it; received() says how much came. Throws
  // std::bad_alloc. Empty: every block is in use by writes; wait until one has ended.
  iovec room(size_t limit);
  void received(size_t bytes) noexcept;
  // Before waiting for more: gives up the block, at once or when its last write ends. What room()
  // returned must not be used any more.
  void idle() noexcept;
  // Before a wait that may be long, with input that has to be kept: in no more memory than it
  // needs. What room() returned must not be used any more.
  void park() noexcept;

  // The block that data() lies in, for a write that uses its bytes; release() when it has ended.
  InputBlock& pin() noexcept;
  void release(InputBlock& block) noexcept;

 private:
  // Blocks that writes may keep while further ones are received into.
  static constexpr unsigned kMaxAbandoned = 4;

  const std::byte* memory() const noexcept {
    return block_ != nullptr ? block_->memory.data() : carried_.data();
  }
  bool make_room();
  InputBlock* new_block();
  void dispose(InputBlock* block) noexcept;

  Resources& resources_;
  Budget& budget_;
  InputBlock* block_ = nullptr;  // owned; nullptr: what there is lies in carried_
  std::array<std::byte, wire::kExtendedRequestSize> carried_;
  size_t begin_ = 0;
  size_t end_ = 0;
  unsigned abandoned_ = 0;
  bool idle_ = false;   // idle() was called, and nothing since
  bool large_ = false;  // much comes at once: a large block pays
};

}  // namespace minivmm::nbd
