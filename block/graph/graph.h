// SPDX-License-Identifier: Apache-2.0
// The graph: nodes by name, and the handles that front ends hold on them.
//
// Owned by main (or a test), outlives every handle. All methods run on a fiber unless they say
// otherwise. Edits are serialised; requests are not affected by them. What is being opened comes in
// when all of it is there (opening.h), and what was taken out is closed while others go on: both
// may wait for a server.
#pragma once

#include <string>

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/sync.h"
#include "base/wait_queue.h"
#include "block/graph/handle.h"
#include "block/graph/node.h"
#include "block/graph/open_policy.h"
#include "block/graph/options.h"

namespace minivmm::block {

class Opening;
class Reaching;

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
  // that is taken or long. Nobody else waits for this or sees any of it before it has succeeded; a
  // node that it refers to stays until then, and gets no new writers. Throws; then nothing is kept.
  // ECANCELED: it was given up, ESHUTDOWN: too late.
  std::shared_ptr<Node> add(Options options);
  // Gives up what is being opened under this name: add() throws ECANCELED. Returns when it has
  // ended; false: there is no such thing. Throws EBUSY where it does not end.
  bool give_up_opening(const std::string& node_name);
  // Gives up all that is being opened, and from then on nothing is. Does not wait.
  void end_openings();
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

  // Holds back new requests that can come to a node, by whatever way down the graph, and waits for
  // those in flight: for changes of what is inside it. Other nodes' requests go on, whatever they
  // wait for; so do those that come to nodes below it by other ways. Without a node it is all of
  // the graph, for edits. Throws ETIMEDOUT naming what is stuck (then nothing is held back).
  //
  // While it lives none of those that reach the node comes or goes or is being closed, none gets a
  // handle or loses one, nothing is being opened that refers to one, and nobody looks at them: who
  // wants that waits, and who is at it is waited for, as is another drain of some of them. On a
  // fiber that has no request in flight itself, and that keeps the node.
  class Drain {
   public:
    Drain(Graph& graph, const Node& node, std::chrono::milliseconds deadline);
    Drain(Graph& graph, std::chrono::milliseconds deadline);
    ~Drain();
    Drain(const Drain&) = delete;
    Drain& operator=(const Drain&) = delete;

   private:
    Drain(Graph& graph, const Node* node, std::chrono::milliseconds deadline);
    void begin(const Node* node, base::Clock::time_point until);
    void wait_for_requests(base::Clock::time_point until);
    void let_go() noexcept;
    Graph& graph_;
    std::unique_ptr<const Reaching> reaching_;
    std::vector<Handle::Root*> held_;
  };
  // Points a front end's handle at another node. Only under a Drain of all.
  void replace_node(Handle& handle, const std::string& node_name);

  // Flushes and closes every node, parents first, otherwise all at once: one that hangs costs the
  // others nothing. Every handle must be closed. Throws the first error after having closed
  // everything.
  void close();

  // Calls `look` with each node, children first; it may wait for what the node says. Nobody else
  // waits for that but a drain of what the node reaches, and who removes one of those that are to
  // be looked at: it is closed when the look at all is over. Nothing of them may outlive the call.
  // Fiber.
  void look(const std::function<void(Node&)>& look);
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
  friend class Opening;
  friend class Reaching;
  struct Entry {
    std::shared_ptr<Node> node;
    bool named;  // kept by its own name; others live with their parent
  };
  std::string owner_of(const std::string& name) const;
  void check_name_free(const std::string& name) const;
  void refuse_writer(const Node& node, const std::string& user) const;
  std::string in_the_way(const Reaching& reaching) const;
  using Editing = std::unique_lock<base::FiberMutex>;
  bool is_drained(const Node& node) const;
  void wait_for_drain(Editing& editing, std::unique_lock<std::mutex>& lock);
  std::shared_ptr<Node> find_undrained(Editing& editing, const std::string& node_name);
  void unregister_root(std::unique_ptr<Handle::Root> root);
  void reap(std::unique_ptr<Handle::Root> root) noexcept;
  // How nodes go (graph_close.cc).
  using Nodes = std::vector<std::shared_ptr<Node>>;
  struct Closing {
    std::shared_ptr<Node> node;
    // What it used when it was taken out: the node itself is not asked any more.
    std::vector<std::weak_ptr<Node>> children;
  };
  class Look;
  bool looked_at(const Node* node) const;
  Nodes going_with(const std::shared_ptr<Node>& node) const;
  bool only_ending_users(const Node& node) const;
  std::shared_ptr<Node> wait_for_users(Editing& editing, const std::string& node_name);
  void take_out(const Nodes& going);
  void close_taken(Nodes taken, std::exception_ptr& first) noexcept;
  std::exception_ptr close_one(std::shared_ptr<Node> node,
                               const std::exception_ptr& first) noexcept;
  std::shared_ptr<Node> take_unused();
  void close_side_by_side(std::exception_ptr& first_error);

  const OpenPolicy policy_;
  Node::CorruptionListener on_corruption_;
  base::FiberMutex editing_;  // one edit at a time
  mutable std::mutex mutex_;
  std::vector<Entry> nodes_;        // guarded by mutex_, in order of opening: children first
  std::vector<Closing> closing_;    // guarded by mutex_; taken out of nodes_, names still taken
  std::vector<Opening*> openings_;  // guarded by mutex_
  std::vector<Look*> looks_;        // guarded by mutex_
  std::vector<const Reaching*> drained_;  // guarded by mutex_; added to under editing_ as well
  bool ending_ = false;                   // guarded by mutex_; nothing is opened any more
  std::vector<Handle::Root*> roots_;      // guarded by mutex_
  base::WaitQueue gone_;  // a node has been closed; a root, an opening, a look or a drain has gone
  unsigned next_number_ = 0;  // guarded by mutex_
  base::WaitGroup reaping_;
};

}  // namespace minivmm::block
