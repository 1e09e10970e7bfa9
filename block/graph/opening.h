// SPDX-License-Identifier: Apache-2.0
// One Graph::add under way: what it has opened so far, and the nodes that it refers to. What it
// opens is found by nobody before all of it is there, so nobody waits for what an opening waits for
// (a server that does not answer): the graph is locked only to look a reference up, and at the end.
//
// On the stack of the fiber that adds; drivers get it for as long as they open.
#pragma once

#include <string>

#include <functional>
#include <memory>
#include <vector>

#include "block/graph/edge.h"
#include "block/graph/node.h"
#include "block/graph/open_policy.h"
#include "block/graph/options.h"

namespace minivmm::block {

class Graph;
struct NodeConfig;

// How many layers one add() may open: an image's recorded chain that is longer, or a loop, is
// refused with the chain. (Requests recurse through the layers and go on with a fresh stack where
// one is used up.)
inline constexpr size_t kMaxGraphDepth = 200;

class Opening {
 public:
  Opening(const Opening&) = delete;
  Opening& operator=(const Opening&) = delete;

  // For drivers, on their fiber: the child under `key` ("file", "backing"), opened from its inline
  // options or found by its reference. `inherit_read_only` makes an inline child read-only.
  // Children opened inline are closed with their parent.
  std::shared_ptr<Node> open_child(Options& parent, const char* key, bool inherit_read_only);
  // The same for options that a driver made itself (a recorded backing file).
  std::shared_ptr<Node> open_inline(Options options, const char* key);
  const OpenPolicy& policy() const noexcept;

  // For drivers that wait for somebody else while they open: `give_up` makes an end of it, with
  // errors that say why. Called at most once, on a fiber of any loop, and not where the opening
  // has succeeded; must not wait. Throws ECANCELED where the opening was given up already.
  using GiveUp = std::function<void(const std::string& why)>;
  void when_given_up(GiveUp give_up);

 private:
  friend class Graph;
  friend class Reaching;
  // What is being opened.
  struct Layer {
    std::string node_name;
    std::string label;  // its file name, where it has one
  };
  struct Opened {
    std::shared_ptr<Node> node;
    bool named;
  };
  // A node that was there already. It stays while it is referred to.
  struct Reference {
    std::unique_ptr<Edge> edge;
    bool writes;  // what is opened is to write to it
  };

  // Throws EEXIST, and ESHUTDOWN once the graph is being closed.
  Opening(Graph& graph, const Options& options);
  ~Opening();
  std::shared_ptr<Node> run(Options options);
  std::shared_ptr<Node> open(Options options, const char* key);
  void begin_layer(NodeConfig& config, const char* key, const Options& options);
  void end_layer(const std::shared_ptr<Node>& node, bool named);
  std::string make_name(const char* key) const;
  void check_depth() const;
  std::shared_ptr<Node> refer_to(const std::string& node_name, bool writes);
  void publish();
  void undo() noexcept;
  void check_wanted() const;
  std::vector<GiveUp> give_up(const std::string& why);
  std::string describe() const;

  Graph& graph_;
  const std::string name_;  // of what is added, where it was given; reserved from the start
  // Guarded by the graph's mutex.
  std::vector<Layer> layers_;   // outermost first
  std::vector<Opened> opened_;  // children first
  std::vector<Reference> references_;
  std::vector<GiveUp> give_ups_;
  std::string given_up_;  // why; empty: it is not
  bool undone_ = false;   // what was opened is being closed
};

}  // namespace minivmm::block
