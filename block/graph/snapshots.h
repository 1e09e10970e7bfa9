// SPDX-License-Identifier: Apache-2.0
// The snapshots that a node keeps inside its image: states of the disk by name.
//
// Owned by the node, and shown by filters above it, too (Node::snapshots). On a fiber. Changes are
// made while no request of the node is in flight: before its first user, or under a Graph::Drain.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <vector>

namespace minivmm::block {

class Node;

class Snapshots {
 public:
  // In whose image they are.
  virtual const Node& node() const noexcept = 0;

  struct Info {
    std::string id;
    std::string name;
    uint64_t disk_size = 0;
    uint64_t vm_state_bytes = 0;
    uint32_t date_seconds = 0;  // since the epoch
  };
  virtual std::vector<Info> list() = 0;

  // What the disk holds now; returns the id. Durable on return, as are the others. Throws; then
  // the disk and all snapshots are as they were, but for clusters that a repair finds leaked.
  virtual std::string create(std::string_view name) = 0;
  // The disk becomes what it was; it may get another size. What it held since is lost. By id, or by
  // name where there is no such id. Throws ENOENT.
  virtual void apply(std::string_view id_or_name) = 0;
  // The first of this name and of this id; an empty one means any. Throws ENOENT.
  virtual void remove(std::string_view name, std::string_view id = {}) = 0;

 protected:
  ~Snapshots() = default;
};

}  // namespace minivmm::block
