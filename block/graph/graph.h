// SPDX-License-Identifier: Apache-2.0
// The graph: nodes by name, and the handles that front ends hold on them.
//
// Owned by main (or a test), outlives every handle. All methods run on a fiber unless they say
// otherwise. Opening and closing are serialised; requests are not affected by them.
#pragma once

#include <string>

#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "base/sync.h"
#include "block/graph/handle.h"
#include "block/graph/node.h"
#include "block/graph/open_policy.h"
#include "block/graph/options.h"

namespace minivmm::block {

// Requests recurse through the layers on a fiber's stack, so the depth is bounded (and tested at
// the bound). Longer backing chains are refused by name.
inline constexpr unsigned kMaxGraphDepth = 64;

class Graph {
 public:
  explicit Graph(OpenPolicy policy = {});
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  // Everything must have been closed.
  ~Graph();

  const OpenPolicy& policy() const noexcept { return policy_; }

  // Opens the node that `options` describe, with its children, and keeps it under its node-name
  // (one is made up where none is given: "#block0"). Throws; then nothing is kept.
  std::shared_ptr<Node> add(Options options);
  // The node, or ENOENT naming the nodes that there are. Any thread.
  std::shared_ptr<Node> find(const std::string& node_name) const;
  // Closes and forgets a node without users. EBUSY names them.
  void remove(const std::string& node_name);

  // A front end's hold on a node.
  Handle attach(const std::string& node_name, std::string user, Permissions permissions);

  // For drivers: the child under `key` ("file", "backing"), opened from its inline options or found
  // by its reference. `inherit_read_only` makes an inline child read-only. Children opened inline
  // are closed with their parent.
  std::shared_ptr<Node> open_child(Options& parent, const char* key, bool inherit_read_only);
  // The same for options that a driver made itself (a recorded backing file).
  std::shared_ptr<Node> open_inline(Options options);

  // Holds back new requests of every handle and waits for those in flight. Throws ETIMEDOUT naming
  // what is stuck (then nothing is held back). Nestable.
  class Drain {
   public:
    Drain(Graph& graph, std::chrono::milliseconds deadline);
    ~Drain();
    Drain(const Drain&) = delete;
    Drain& operator=(const Drain&) = delete;

   private:
    Graph& graph_;
    std::vector<Handle::Root*> held_;
  };

  // Flushes and closes every node, parents first. Every handle must be closed. Throws the first
  // error after having closed everything.
  void close();

  // The live state, a line each: nodes, users, requests in flight, errors. Any thread.
  std::vector<std::string> describe() const;

 private:
  friend class Handle;
  struct Entry {
    std::shared_ptr<Node> node;
    bool named;  // kept by its own name; others live with their parent
  };
  std::shared_ptr<Node> open(Options options, bool named);
  std::shared_ptr<Node> open_locked(Options options, bool named);
  void register_node(std::shared_ptr<Node> node, bool named);
  void register_root(Handle::Root& root);
  void unregister_root(Handle::Root& root) noexcept;
  void reap(std::unique_ptr<Handle::Root> root) noexcept;
  void close_unused(std::exception_ptr* first_error);

  const OpenPolicy policy_;
  base::FiberMutex editing_;  // one open, close or edit at a time
  mutable std::mutex mutex_;
  std::vector<Entry> nodes_;          // guarded by mutex_, in order of opening: children first
  std::vector<Handle::Root*> roots_;  // guarded by mutex_
  base::WaitGroup reaping_;
  unsigned next_number_ = 0;    // guarded by mutex_
  unsigned opening_depth_ = 0;  // of open calls within each other; guarded by editing_
};

}  // namespace minivmm::block
