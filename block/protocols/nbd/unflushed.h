// SPDX-License-Identifier: Apache-2.0
// What a server has acknowledged and not yet flushed: copies of writes, in the order in which they
// were acknowledged. When the server goes away in between (it may be killed with them in its
// memory), they are done again on the next connection before anything else, so that a flush after
// that keeps its promise.
//
// Any thread. Bounded by its user, who flushes when bytes() has grown.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "base/buffer.h"

namespace minivmm::block {

struct NbdCommand;

class UnflushedLog {
 public:
  struct Record;
  using Records = std::list<std::shared_ptr<Record>>;

  // A list of one, made before the command is: adding it then takes no memory.
  static Records prepare(const NbdCommand& command, base::Buffer data);

  // The command of `one` was acknowledged.
  void add(Records& one) noexcept;
  // What was acknowledged so far has a lower number.
  uint64_t mark() const;
  // A flush that was begun at `mark` has succeeded.
  void flushed(uint64_t mark);
  uint64_t bytes() const;
  bool empty() const;
  // Those there are, oldest first.
  std::vector<std::shared_ptr<Record>> records() const;

 private:
  mutable std::mutex mutex_;
  Records records_;     // guarded by mutex_
  uint64_t next_ = 0;   // guarded by mutex_
  uint64_t bytes_ = 0;  // guarded by mutex_
};

}  // namespace minivmm::block
