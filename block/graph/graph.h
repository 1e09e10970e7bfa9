// SPDX-License-Identifier: Apache-2.0
// The graph: nodes by name, and the handles that front ends hold on them.
//
// Owned by main (or a test), outlives every handle. All methods run on a fiber unless they say
// otherwise. Opening and taking out are serialised; requests are not affected by them. What was
// taken out is closed while others go on: its last flush may wait for a server.
#pragma once

#include <string>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/sync.h"
#include "base/wait_queue.h"
#include "block/graph/handle.h"
#include "block/graph/node.h"
#include "block/graph/open_policy.h"
#include "block/graph/options.h"

namespace minivmm::block {

// How many layers one add() may open: an image's recorded chain that is longer, or a loop, is
// refused with the chain. (Requests recurse through the layers and go on with a fresh stack where
// one is used up.)
inline constexpr size_t kMaxGraphDepth = 200;

class Graph {
 public:
  explicit Graph(OpenPolicy policy = {});
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  // Everything must have been closed.
  ~Graph();

  const OpenPolicy& policy() const noexcept { return policy_; }

  // Of nodes that are opened from then on. Before the first.
  void set_corruption_listener(Node::CorruptionListener listener) {
    on_corruption_ = std::move(listener);
  }

  // Opens the node that `options` describe, with its children, and keeps it under its node-name.
  // Where none is given one is made up: "disk0.file" for the child `file` of disk0, "#block0" where
  // that is taken or long. A server that is part of it is reached before anything else waits for
  // this. Throws; then nothing is kept.
  std::shared_ptr<Node> add(Options options);
  // Keeps a node that was made elsewhere (a job's filter, a test's) under its name, as if added.
  // EEXIST if the name is taken.
  void adopt(std::shared_ptr<Node> node);
  // The node, or ENOENT naming the nodes that there are. Any thread.
  std::shared_ptr<Node> find(const std::string& node_name) const;
  // Forgets a node without users, and closes it and what was opened for it. EBUSY names the users;
  // those that are being closed already are waited for. What closing throws comes when it is gone.
  void remove(const std::string& node_name);

  // A front end's hold on a node.
  Handle attach(const std::string& node_name, std::string user, Permissions permissions);

  // For drivers: the child under `key` ("file", "backing"), opened from its inline options or found
  // by its reference. `inherit_read_only` makes an inline child read-only. Children opened inline
  // are closed with their parent.
  std::shared_ptr<Node> open_child(Options& parent, const char* key, bool inherit_read_only);
  // The same for options that a driver made itself (a recorded backing file).
  std::shared_ptr<Node> open_inline(Options options, const char* key);

  // Holds back new requests of every handle and waits for those in flight: for edits of the live
  // graph, and for nodes that are being closed. Throws ETIMEDOUT naming what is stuck (then nothing
  // is held back). While it lives nodes are neither opened nor closed by others. On a fiber that
  // has no request in flight itself.
  class Drain {
   public:
    Drain(Graph& graph, std::chrono::milliseconds deadline);
    ~Drain();
    Drain(const Drain&) = delete;
    Drain& operator=(const Drain&) = delete;

   private:
    void lock_when_none_closes(base::Clock::time_point until);
    void let_go() noexcept;
    Graph& graph_;
    std::vector<Handle::Root*> held_;
  };
  // Points a front end's handle at another node. Only under a Drain.
  void replace_node(Handle& handle, const std::string& node_name);

  // Flushes and closes every node, parents first, otherwise all at once: one that hangs costs the
  // others nothing. Every handle must be closed. Throws the first error after having closed
  // everything.
  void close();

  // Calls `look` with all nodes, children first, while none is opened or taken out: who keeps one
  // that is being removed keeps its file open and locked, so nothing of them may outlive the call.
  // Fiber.
  void look(const std::function<void(std::span<const std::shared_ptr<Node>>)>& look);
  // Who uses nodes from outside. Any thread.
  struct User {
    std::string name;  // "NBD export 'disk0'"
    std::string node_name;
    uint64_t in_flight = 0;
  };
  std::vector<User> users() const;
  // The live state, a line each: nodes, users, requests in flight, errors. Any thread.
  std::vector<std::string> describe() const;

 private:
  friend class Handle;
  struct Entry {
    std::shared_ptr<Node> node;
    bool named;  // kept by its own name; others live with their parent
  };
  // What is being opened.
  struct Opening {
    std::string node_name;
    std::string label;  // its file name, where it has one
  };
  std::shared_ptr<Node> open(Options options, const char* key);
  std::string make_name(const char* key);
  std::string owner_of(const std::string& name) const;
  void check_name_free(const std::string& name) const;
  void check_depth() const;
  void unregister_root(std::unique_ptr<Handle::Root> root);
  void reap(std::unique_ptr<Handle::Root> root) noexcept;
  // How nodes go (graph_close.cc).
  using Nodes = std::vector<std::shared_ptr<Node>>;
  Nodes going_with(const std::shared_ptr<Node>& node) const;
  bool only_ending_users(const Node& node) const;
  std::shared_ptr<Node> wait_for_users(std::unique_lock<base::FiberMutex>& editing,
                                       const std::string& node_name);
  void take_out(const Nodes& going);
  void close_taken(Nodes taken, std::exception_ptr& first) noexcept;
  std::exception_ptr close_one(std::shared_ptr<Node> node,
                               const std::exception_ptr& first) noexcept;
  std::shared_ptr<Node> take_unused();
  void close_side_by_side(std::exception_ptr& first_error);

  const OpenPolicy policy_;
  Node::CorruptionListener on_corruption_;
  base::FiberMutex editing_;      // one open, close or edit at a time; held across I/O
  std::vector<Opening> opening_;  // outermost first; under editing_
  mutable std::mutex mutex_;
  std::vector<Entry> nodes_;          // guarded by mutex_, in order of opening: children first
  Nodes closing_;                     // guarded by mutex_; taken out of nodes_, names still taken
  std::vector<Handle::Root*> roots_;  // guarded by mutex_
  base::WaitQueue gone_;              // a node has been closed, or a root has gone
  unsigned next_number_ = 0;          // under editing_
  base::WaitGroup reaping_;
};

}  // namespace minivmm::block
