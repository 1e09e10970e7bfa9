// SPDX-License-Identifier: Apache-2.0
// The state behind a Handle: its edge, the requests in flight, and the drain. Private to the graph.
#pragma once

#include <string>

#include <atomic>
#include <mutex>

#include "base/epoch.h"
#include "base/wait_queue.h"
#include "block/graph/edge.h"
#include "block/graph/handle.h"

namespace minivmm::block {

class Handle::Root {
 public:
  Root(Graph& graph, std::shared_ptr<Node> node, std::string user, Permissions permissions);

  // A request's hold: waits while the handle is drained.
  base::Epoch::Pin enter();
  // The same for who cannot wait: empty while it is drained.
  base::Epoch::Pin try_enter() noexcept;

  // Drain: hold() keeps new requests out, wait_idle waits for those inside, let_go lets them in.
  void hold() noexcept { held_.fetch_add(1, std::memory_order_seq_cst); }
  void let_go() noexcept;
  bool wait_idle(base::Clock::time_point deadline) {
    return in_flight_.synchronize_until(deadline);
  }
  uint64_t in_flight() const noexcept { return in_flight_.in_flight(); }

  // Waits for requests in flight, also those that a drain holds back, and flushes what was written.
  // Throws the flush's error.
  void finish();

  Graph& graph;
  Edge edge;
  std::atomic<bool> written{false};  // something was written since attach
  std::atomic<bool> ending{false};   // finish() was called

 private:
  base::Epoch::Pin park(base::Epoch::Pin entered);

  base::Epoch in_flight_;
  std::atomic<uint32_t> held_{0};
  std::mutex mutex_;
  base::WaitQueue let_in_;
  uint32_t parked_ = 0;  // requests in park(); guarded by mutex_
  base::WaitQueue none_parked_;
};

}  // namespace minivmm::block
