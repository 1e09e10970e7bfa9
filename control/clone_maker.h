// SPDX-License-Identifier: Apache-2.0
// Clone exports: for each client a qcow2 overlay of one node, in memory or in a file. Owned by the
// NBD server's export; the graph outlives it. Fibers of any loop, many at once.
//
//     client's handle -> qcow2 "golden.clone3" -> quota -> memory or file
//                              \-> backing: the node "golden", which nobody may write to meanwhile
//
// What is in a file without a name, or in memory, is gone with its last user. In a directory for
// clones, those of clients with a name stay: EXPORT@CLIENT.qcow2, an overlay as any other.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <memory>

#include "block/filters/quota.h"
#include "block/formats/qcow2/create.h"
#include "block/graph/graph.h"
#include "control/config.h"
#include "nbd-server/server.h"

namespace minivmm::control {

class CloneMaker final : public nbd::CloneSource {
 public:
  // `wanted.clone` is set; its node exists. Before I/O threads are confined.
  CloneMaker(block::Graph& graph, const Export& wanted);

  block::Handle open(const std::string& client) override;
  void close(block::Handle disk, const std::string& client) override;

 private:
  // The nodes of a clone, undone if it does not come to be.
  class Nodes;

  std::shared_ptr<block::Node> add_file(Nodes& nodes, const std::string& name,
                                        const std::string& kept);
  void make_kept_file(const std::string& name, const std::string& path);
  block::qcow2::CreateOptions create_options() const;
  void require_same_base(const block::Node& overlay, const std::string& path) const;
  // Empty: this client's is not kept.
  std::string kept_path(const std::string& client) const;

  block::Graph& graph_;
  const std::string export_name_;
  const CloneOptions options_;
  const std::shared_ptr<block::Node> base_;
  const std::string recorded_base_;  // as a kept clone names it; empty: not at all
  const std::shared_ptr<block::SpaceBudget> space_;
  std::atomic<uint64_t> next_{0};
};

}  // namespace minivmm::control
