// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/node_locks.h"

#include <algorithm>
#include <utility>

namespace minivmm::control::qmp {

// All at once, so that two who want the same do not wait for each other.
NodeLocks::Hold::Hold(NodeLocks& locks, std::vector<std::string> nodes)
    : locks_(locks), nodes_(std::move(nodes)) {
  std::unique_lock lock(locks_.mutex_);
  const auto taken = [this](const std::string& node) { return locks_.held_.contains(node); };
  while (std::any_of(nodes_.begin(), nodes_.end(), taken)) {
    locks_.freed_.wait(lock, "another command that changes a node");
  }
  std::set<std::string> held = locks_.held_;
  held.insert(nodes_.begin(), nodes_.end());
  locks_.held_.swap(held);
}

NodeLocks::Hold::~Hold() {
  const std::lock_guard lock(locks_.mutex_);
  for (const std::string& node : nodes_) locks_.held_.erase(node);
  locks_.freed_.notify_all();
}

}  // namespace minivmm::control::qmp
