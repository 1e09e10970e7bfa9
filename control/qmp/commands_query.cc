// SPDX-License-Identifier: Apache-2.0
// What there is and how it does: commands that change nothing.
#include <string_view>

#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"

namespace minivmm::control::qmp {
namespace {

using block::Node;

Json version(Target&, const Arguments&) { return version_json(); }

Json commands(Target&, const Arguments&) {
  Json out = Json::array({{{"name", "qmp_capabilities"}}});
  for (const Command* each : all_commands()) out.push_back({{"name", each->name}});
  return out;
}

Json status(Target& target, const Arguments&) {
  const std::string_view word = target.guest_status();
  if (word.empty()) throw Failure("There is no guest: this is minivmm serve");
  return {{"status", word}, {"singlestep", false}, {"running", word == "running"}};
}

Json state(Target& target, const Arguments&) { return {{"lines", target.state()}}; }

Json exports(Target& target, const Arguments&) {
  Json out = Json::array();
  for (const FrontEnds::Published& each : target.front_ends().published()) {
    out.push_back({{"id", each.id},
                   {"type", each.nbd ? "nbd" : "fuse"},
                   {"node-name", each.node_name},
                   {"shutting-down", each.going},
                   {"name", each.name},
                   {"writable", each.writable}});
  }
  return out;
}

Json nbd_server(Target& target, const Arguments&) { return {{"uris", target.front_ends().uris()}}; }

Json bitmaps_of(Node& node) {
  Json out = Json::array();
  block::DirtyBitmaps* const bitmaps = node.dirty_bitmaps();
  if (bitmaps == nullptr) return out;
  // Those that nobody has asked for yet are read now.
  for (const auto& each : bitmaps->list()) {
    if (each.inconsistent || each.dirty_bytes || node.size() == 0) continue;
    try {
      (void)bitmaps->status(each.name, 0, node.size());
    } catch (const base::Error& e) {
      base::log_warning("{}: bitmap '{}': {}", node.describe(), each.name, e.what());
    }
  }
  for (const auto& each : bitmaps->list()) {
    out.push_back({{"name", each.name},
                   {"recording", each.enabled},
                   {"busy", false},
                   {"persistent", true},
                   {"count", each.dirty_bytes.value_or(0)},
                   {"granularity", each.granularity}});
    if (each.inconsistent) out.back()["inconsistent"] = true;
  }
  return out;
}

Json snapshots_of(Node& node) {
  Json out = Json::array();
  block::Snapshots* const snapshots = node.snapshots();
  if (snapshots == nullptr) return out;
  for (const auto& each : snapshots->list()) out.push_back(snapshot_json(each));
  return out;
}

// QMP's BlockDeviceInfo, with who uses the node and what it counts.
Json node_json(Node& node, const std::vector<block::Graph::User>& users) {
  const std::string file = node.filename();
  Json image{{"filename", file}, {"format", node.driver()}, {"virtual-size", node.size()}};
  if (Json snapshots = snapshots_of(node); !snapshots.empty()) {
    image["snapshots"] = std::move(snapshots);
  }
  Json out{{"node-name", node.name()},
           {"drv", node.driver()},
           {"file", file},
           {"ro", node.read_only()},
           {"cache", {{"writeback", !node.write_through()}}},
           {"image", std::move(image)},
           {"dirty-bitmaps", bitmaps_of(node)},
           {"users", node.users()},
           {"errors", node.counters().errors.load(std::memory_order_relaxed)}};
  uint64_t in_flight = 0;
  for (const auto& user : users) {
    if (user.node_name == node.name()) in_flight += user.in_flight;
  }
  out["in-flight"] = in_flight;
  if (const std::string holds = node.state(); !holds.empty()) out["state"] = holds;
  return out;
}

Json nodes(Target& target, const Arguments& arguments) {
  const std::string name = arguments.text("node-name");
  Json out = Json::array();
  const auto users = target.graph().users();
  target.graph().look([&](Node& node) {
    if (name.empty() || node.name() == name) out.push_back(node_json(node, users));
  });
  if (!name.empty() && out.empty()) (void)target.graph().find(name);  // says what there is
  return out;
}

// The guest's disks.
Json disks(Target& target, const Arguments&) {
  const std::vector<std::string> names = target.guest_disks();
  const bool failed = target.guest_status() == "io-error";
  Json out = Json::array();
  const auto users = target.graph().users();
  target.graph().look([&](Node& node) {
    if (std::find(names.begin(), names.end(), node.name()) == names.end()) return;
    out.push_back({{"device", node.name()},
                   {"qdev", node.name()},
                   {"type", "unknown"},
                   {"removable", false},
                   {"locked", false},
                   {"io-status", failed ? "failed" : "ok"},
                   {"inserted", node_json(node, users)}});
  });
  return out;
}

constexpr Parameter kNodes[] = {{"flat", Kind::kBoolean, true}, {"node-name", Kind::kString, true}};

constexpr Command kCommands[] = {
    {"query-block", {}, disks},           {"query-block-exports", {}, exports},
    {"query-commands", {}, commands},     {"query-named-block-nodes", kNodes, nodes},
    {"query-nbd-server", {}, nbd_server}, {"query-state", {}, state},
    {"query-status", {}, status},         {"query-version", {}, version},
};

}  // namespace

Json snapshot_json(const block::Snapshots::Info& info) {
  return {{"id", info.id},
          {"name", info.name},
          {"vm-state-size", info.vm_state_bytes},
          {"date-sec", info.date_seconds},
          {"date-nsec", 0},
          {"vm-clock-sec", 0},
          {"vm-clock-nsec", 0}};
}

std::span<const Command> query_commands() { return kCommands; }

}  // namespace minivmm::control::qmp
