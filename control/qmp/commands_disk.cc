// SPDX-License-Identifier: Apache-2.0
// Changes of a disk while it is used: its size, its dirty bitmaps, the snapshots inside it.
#include <string>

#include <algorithm>
#include <cerrno>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/dirty_bitmaps.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"

namespace minivmm::control::qmp {
namespace {

using block::DirtyBitmaps;
using block::Node;
using block::Permissions;

// A node that stays while a command is at it.
class Held {
 public:
  Held(Target& target, const std::string& node_name, const char* command,
       Permissions permissions = Permissions::observer())
      : handle_(target.graph().attach(node_name, command, permissions)),
        node_(target.graph().find(handle_.node_name())) {}
  block::Handle& handle() noexcept { return handle_; }
  Node& node() noexcept { return *node_; }
  // Flushes. The node first: who keeps one that others remove keeps its file open.
  void close() {
    node_.reset();
    handle_.close();
  }

 private:
  block::Handle handle_;
  std::shared_ptr<Node> node_;
};

// --- block_resize ---

constexpr Parameter kResize[] = {
    {"device", Kind::kString, true}, {"node-name", Kind::kString, true}, {"size", Kind::kInteger}};

Json resize(Target& target, const Arguments& given) {
  if (given.has("device") == given.has("node-name")) {
    throw Failure("One of the parameters 'device' and 'node-name' is expected");
  }
  const uint64_t size = given.integer("size", 0, block::kMaxDiskSize);
  const std::string node = given.text("node-name", given.text("device"));
  const NodeLocks::Hold changing(target.changing(), {node});
  Held held(target, node, "block_resize", Permissions::resizer());
  held.handle().truncate(size);
  held.close();  // flushes
  return Json::object();
}

// --- bitmaps ---

DirtyBitmaps& bitmaps_of(Node& node) {
  if (DirtyBitmaps* const out = node.dirty_bitmaps(); out != nullptr) return *out;
  throw Failure(
      fmt::format("{} keeps no dirty bitmaps: qcow2 images of version 3 do", node.describe()));
}

constexpr Parameter kBitmap[] = {{"node", Kind::kString}, {"name", Kind::kString}};
constexpr Parameter kBitmapAdd[] = {{"node", Kind::kString},
                                    {"name", Kind::kString},
                                    {"granularity", Kind::kInteger, true},
                                    {"persistent", Kind::kBoolean, true},
                                    {"disabled", Kind::kBoolean, true}};
constexpr Parameter kBitmapMerge[] = {
    {"node", Kind::kString}, {"target", Kind::kString}, {"bitmaps", Kind::kList}};

// Runs `change(bitmaps, name)`.
template <typename Change>
Json change_bitmap(Target& target, const Arguments& given, const char* command, Change change) {
  const NodeLocks::Hold changing(target.changing(), {given.text("node")});
  Held held(target, given.text("node"), command);
  change(bitmaps_of(held.node()), given.text("name"));
  held.close();
  return Json::object();
}

Json bitmap_add(Target& target, const Arguments& given) {
  // It is what QEMU does if nothing is said, and would be gone with the process.
  if (!given.boolean("persistent")) {
    throw Failure("Bitmaps are kept in the image here: 'persistent' is expected to be true");
  }
  const uint64_t granularity = given.integer("granularity", 1, UINT32_MAX);
  const bool enabled = !given.boolean("disabled");
  return change_bitmap(target, given, "block-dirty-bitmap-add",
                       [&](DirtyBitmaps& bitmaps, const std::string& name) {
                         bitmaps.add(name, granularity, enabled);
                       });
}

Json bitmap_remove(Target& target, const Arguments& given) {
  return change_bitmap(
      target, given, "block-dirty-bitmap-remove",
      [](DirtyBitmaps& bitmaps, const std::string& name) { bitmaps.remove(name); });
}

Json bitmap_clear(Target& target, const Arguments& given) {
  return change_bitmap(target, given, "block-dirty-bitmap-clear",
                       [](DirtyBitmaps& bitmaps, const std::string& name) { bitmaps.clear(name); });
}

Json bitmap_enable(Target& target, const Arguments& given) {
  return change_bitmap(
      target, given, "block-dirty-bitmap-enable",
      [](DirtyBitmaps& bitmaps, const std::string& name) { bitmaps.set_enabled(name, true); });
}

Json bitmap_disable(Target& target, const Arguments& given) {
  return change_bitmap(
      target, given, "block-dirty-bitmap-disable",
      [](DirtyBitmaps& bitmaps, const std::string& name) { bitmaps.set_enabled(name, false); });
}

// What can be merged. Looked at before anything is changed.
struct Source {
  std::unique_ptr<Held> held;
  std::string name;
};

// The node and the name of each.
std::vector<std::pair<std::string, std::string>> sources_of(const Arguments& given) {
  std::vector<std::pair<std::string, std::string>> out;
  for (const Json& each : given.json("bitmaps")) {
    if (each.is_string()) {
      out.emplace_back(given.text("node"), each.get<std::string>());
    } else {
      const Arguments named(kBitmap, each.is_object() ? each : Json::object());
      out.emplace_back(named.text("node"), named.text("name"));
    }
  }
  return out;
}

Source source_of(Target& target, const std::string& from, const std::string& name) {
  Source out;
  out.name = name;
  out.held = std::make_unique<Held>(target, from, "block-dirty-bitmap-merge");
  (void)bitmaps_of(out.held->node()).status(out.name, 0, out.held->node().size());
  return out;
}

Json bitmap_merge(Target& target, const Arguments& given) {
  const auto wanted = sources_of(given);
  std::vector<std::string> nodes{given.text("node")};
  for (const auto& [node, name] : wanted) nodes.push_back(node);
  const NodeLocks::Hold changing(target.changing(), std::move(nodes));
  Held held(target, given.text("node"), "block-dirty-bitmap-merge");
  std::vector<Source> sources;
  for (const auto& [node, name] : wanted) {
    sources.push_back(source_of(target, node, name));
    const uint64_t size = sources.back().held->node().size();
    if (size < held.node().size()) {
      throw Failure(
          fmt::format("Bitmap '{}' is of a smaller disk ({} bytes)", sources.back().name, size));
    }
  }
  for (Source& source : sources) {
    bitmaps_of(held.node())
        .merge(given.text("target"), bitmaps_of(source.held->node()), source.name);
    source.held->close();
  }
  held.close();
  return Json::object();
}

// --- snapshots ---

// Requests in flight have to end for the moment of a snapshot.
constexpr std::chrono::seconds kDrainPatience{10};

constexpr Parameter kSnapshot[] = {{"device", Kind::kString}, {"name", Kind::kString}};
constexpr Parameter kSnapshotDelete[] = {
    {"device", Kind::kString}, {"id", Kind::kString, true}, {"name", Kind::kString, true}};

block::Snapshots& snapshots_of(Node& node) {
  if (block::Snapshots* const out = node.snapshots(); out != nullptr) return *out;
  throw Failure(
      fmt::format("Block format '{}' used by device '{}' does not support internal "
                  "snapshots",
                  node.driver(), node.name()));
}

Json snapshot_create(Target& target, const Arguments& given) {
  const std::string name = given.text("name");
  if (name.empty()) throw Failure("Name is empty");
  const NodeLocks::Hold changing(target.changing(), {given.text("device")});
  Held held(target, given.text("device"), "blockdev-snapshot-internal-sync");
  block::Snapshots& snapshots = snapshots_of(held.node());
  for (const auto& each : snapshots.list()) {
    if (each.name != name) continue;
    throw Failure(fmt::format("Snapshot with name '{}' already exists on device '{}'", name,
                              held.node().name()));
  }
  {
    const block::Graph::Drain drain(target.graph(), snapshots.node(), kDrainPatience);
    (void)snapshots.create(name);
  }
  held.close();
  return Json::object();
}

Json snapshot_delete(Target& target, const Arguments& given) {
  const std::string id = given.text("id");
  const std::string name = given.text("name");
  if (id.empty() && name.empty()) throw Failure("Name or id must be provided");
  const NodeLocks::Hold changing(target.changing(), {given.text("device")});
  Held held(target, given.text("device"), "blockdev-snapshot-delete-internal-sync");
  block::Snapshots& snapshots = snapshots_of(held.node());
  const auto list = snapshots.list();
  const auto found = std::find_if(list.begin(), list.end(), [&](const auto& each) {
    return (id.empty() || each.id == id) && (name.empty() || each.name == name);
  });
  if (found == list.end()) {
    throw Failure(fmt::format("Snapshot with id '{}' and name '{}' does not exist on device '{}'",
                              id, name, held.node().name()));
  }
  {
    const block::Graph::Drain drain(target.graph(), snapshots.node(), kDrainPatience);
    snapshots.remove(found->name, found->id);
  }
  held.close();
  return snapshot_json(*found);
}

constexpr Command kCommands[] = {
    {"block-dirty-bitmap-add", kBitmapAdd, bitmap_add},
    {"block-dirty-bitmap-clear", kBitmap, bitmap_clear},
    {"block-dirty-bitmap-disable", kBitmap, bitmap_disable},
    {"block-dirty-bitmap-enable", kBitmap, bitmap_enable},
    {"block-dirty-bitmap-merge", kBitmapMerge, bitmap_merge},
    {"block-dirty-bitmap-remove", kBitmap, bitmap_remove},
    {"block_resize", kResize, resize},
    {"blockdev-snapshot-delete-internal-sync", kSnapshotDelete, snapshot_delete},
    {"blockdev-snapshot-internal-sync", kSnapshot, snapshot_create},
};

}  // namespace

std::span<const Command> disk_commands() { return kCommands; }

}  // namespace minivmm::control::qmp
