// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/quarantine.h"

#include <iterator>
#include <utility>

namespace minivmm::block::qcow2 {

void Quarantine::add(HostClusters clusters) {
  if (clusters.count == 0) return;
  const std::lock_guard lock(mutex_);
  if (!waiting_.empty() && waiting_.back().first + waiting_.back().count == clusters.first) {
    waiting_.back().count += clusters.count;
  } else {
    waiting_.push_back({clusters.first, clusters.count});
  }
  waiting_count_.fetch_add(clusters.count, std::memory_order_relaxed);
}

Quarantine::Runs Quarantine::take_waiting() {
  const std::lock_guard lock(mutex_);
  waiting_count_.store(0, std::memory_order_relaxed);
  return std::exchange(waiting_, {});
}

void Quarantine::mature(Runs runs) {
  const std::lock_guard lock(mutex_);
  for (const ClusterRun& run : runs) matured_count_.fetch_add(run.count, std::memory_order_relaxed);
  matured_.insert(matured_.end(), runs.begin(), runs.end());
}

void Quarantine::put_back(const Runs& runs) {
  const std::lock_guard lock(mutex_);
  for (const ClusterRun& run : runs) {
    waiting_count_.fetch_add(run.count, std::memory_order_relaxed);
    waiting_.push_back(run);
  }
}

Quarantine::Runs Quarantine::take_matured() {
  const std::lock_guard lock(mutex_);
  matured_count_.store(0, std::memory_order_relaxed);
  return std::exchange(matured_, {});
}

bool Quarantine::empty() const {
  const std::lock_guard lock(mutex_);
  return matured_.empty() && waiting_.empty();
}

}  // namespace minivmm::block::qcow2
