// SPDX-License-Identifier: Apache-2.0
// Commands that change what is inside a node wait for each other, and for no others: what one waits
// for (a server) may never come.
#pragma once

#include <string>

#include <mutex>
#include <set>
#include <vector>

#include "base/wait_queue.h"

namespace minivmm::control::qmp {

class NodeLocks {
 public:
  // Fiber. All nodes of these names are its alone while it lives; waits until nobody has one.
  class Hold {
   public:
    Hold(NodeLocks& locks, std::vector<std::string> nodes);
    ~Hold();
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    NodeLocks& locks_;
    const std::vector<std::string> nodes_;
  };

 private:
  std::mutex mutex_;
  base::WaitQueue freed_;
  std::set<std::string> held_;  // guarded by mutex_
};

}  // namespace minivmm::control::qmp
