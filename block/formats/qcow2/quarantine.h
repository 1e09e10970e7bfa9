// SPDX-License-Identifier: Apache-2.0
// Host clusters that the guest no longer refers to, on their way to being free:
//   waiting  -> a commit that began later makes the change of the L2 entry durable
//   matured  -> every request that could know the cluster has ended, its hole is punched, its
//               refcount lowered (Image::reclaim).
// A crash on the way leaves a leak, never a cluster with two owners.
//
// Owned by Image. Any loop; never suspends.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "block/formats/qcow2/free_runs.h"
#include "block/formats/qcow2/l2_entry.h"

namespace minivmm::block::qcow2 {

class Quarantine {
 public:
  using Runs = std::vector<ClusterRun>;

  // After the L2 entry was changed in memory. Each call stands for one reference of each cluster.
  void add(HostClusters clusters);

  // --- The commit: before it copies any L2 slice ---
  Runs take_waiting();
  void mature(Runs runs);           // the commit went well
  void put_back(const Runs& runs);  // it failed
  // --- The reclaimer ---
  Runs take_matured();

  // Clusters that wait for a commit.
  uint64_t waiting() const noexcept { return waiting_count_.load(std::memory_order_relaxed); }
  // Clusters that wait for the reclaimer.
  uint64_t matured() const noexcept { return matured_count_.load(std::memory_order_relaxed); }
  bool empty() const;

 private:
  mutable std::mutex mutex_;
  Runs waiting_;
  Runs matured_;
  std::atomic<uint64_t> waiting_count_{0};
  std::atomic<uint64_t> matured_count_{0};
};

}  // namespace minivmm::block::qcow2
