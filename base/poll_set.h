// SPDX-License-Identifier: Apache-2.0
// A few operations that wait for a descriptor to be ready and that the kernel has not been given:
// while its loop is awake, it looks at them itself, all in one system call. One that is answered by
// a look never had to be queued at the descriptor, woken from there and collected: of a small
// request that a client sends after the other, that was measured to be a fifth of the time. Before
// it sleeps, the loop gives them to its backend.
//
// The loop's thread only. The operations are their fibers' (io_op.h).
#pragma once

#include <poll.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/io_backend.h"

namespace minivmm::base {

class PollSet {
 public:
  // What one look may cost; an operation that finds no place goes to the backend.
  static constexpr size_t kMost = 8;
  // As often, others may be ready and it not: then its place is worth more to others.
  static constexpr unsigned kPatience = 64;

  bool empty() const noexcept { return count_ == 0; }

  // Takes an operation with IoOpcode::kPoll in. False: there is no place for it.
  bool add(IoOp& op) noexcept;
  // Takes it out. False: it is not there.
  bool remove(const IoOp& op) noexcept;

  // Looks at all without waiting: what is ready goes to `sink`, what was passed over too often to
  // `backend`.
  void look(CompletionSink& sink, IoBackend& backend) noexcept;
  // Gives all that is left to `backend`.
  void hand_over(IoBackend& backend) noexcept;

 private:
  struct Place {
    IoOp* op;
    unsigned passed_over;
  };
  void drop(size_t i) noexcept;

  std::array<Place, kMost> places_;
  std::array<pollfd, kMost> fds_;
  size_t count_ = 0;
};

}  // namespace minivmm::base
