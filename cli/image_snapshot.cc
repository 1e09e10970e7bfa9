// SPDX-License-Identifier: Apache-2.0
// minivmm image snapshot
#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/snapshots.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_facts.h"
#include "cli/image_info_output.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::Snapshots;

ImageSyntax image_snapshot_syntax() {
  return image_syntax(
      "Usage: minivmm image snapshot [-l | -c NAME | -a NAME | -d NAME] [options] FILE\n\n"
      "Lists, makes, goes back to or deletes a snapshot inside an image. What the disk holds when\n"
      "it goes back to one is lost, unless another snapshot has it.\n\n"
      "Examples:\n"
      "  minivmm image snapshot -c before-upgrade disk.qcow2\n"
      "  minivmm image snapshot -l disk.qcow2\n"
      "  minivmm image snapshot -a before-upgrade disk.qcow2\n\n",
      {
          {"list-snapshots,l", nullptr, "list them, which is done if nothing else is said"},
          {"create,c", "NAME", "make one of what the disk holds"},
          {"apply,a", "NAME", "make the disk what it was; the name or the number"},
          {"delete,d", "NAME", "delete one"},
      },
      "fiqU");
}

namespace {

struct SnapshotRequest {
  ImageName image;
  std::string action;
  std::string name;
  bool force_share = false;
};

SnapshotRequest read_request(const po::variables_map& values) {
  SnapshotRequest out;
  const auto order = text_values(values, kGivenOptions);
  auto actions = static_cast<size_t>(std::count(order.begin(), order.end(), "list-snapshots"));
  for (const char* action : {"create", "apply", "delete"}) {
    const auto names = text_values(values, action);
    actions += names.size();
    if (names.empty()) continue;
    out.action = action;
    out.name = names.back();
  }
  if (actions == 0 || is_set(values, "list-snapshots")) {
    // qemu-img does nothing then.
    out.action = actions == 0 && personality().drop_in ? "nothing" : "list";
  }
  if (actions > 1) throw UsageError{"Cannot mix '-l', '-a', '-c', '-d'"};
  out.image = one_image(values);
  out.force_share = is_set(values, "force-share");
  if (out.force_share && out.action != "list") {
    throw Error(EINVAL, fmt::format("Could not open '{}': force-share=on can only be used with "
                                    "read-only images",
                                    out.image.text));
  }
  return out;
}

// From the metadata alone: also of images that the driver refuses.
// Fiber.
void list_snapshots(ImageGraph& graph, const SnapshotRequest& request) {
  const NamedFile image = named_file(request.image);
  require_openable(image.path, request.image.text);
  const FileAccess access{.locked = personality().drop_in && !request.force_share};
  fmt::print("{}", snapshots_text(inspect_image(graph, image, access)));
}

void carry_out(Snapshots* snapshots, const SnapshotRequest& request) {
  if (snapshots == nullptr) {
    throw Error(ENOTSUP, request.action == "create"  ? "-95 (Operation not supported)"
                         : request.action == "apply" ? "Block driver does not support snapshots"
                                                     : "snapshot not found");
  }
  if (request.action == "create") {
    (void)snapshots->create(request.name);
  } else if (request.action == "apply") {
    try {
      snapshots->apply(request.name);
    } catch (Error& e) {
      if (e.err() == ENOENT) e.prepend("Failed to load snapshot");
      throw;
    }
  } else {
    snapshots->remove(request.name);
  }
}

// Fiber.
void change_snapshots(ImageGraph& graph, const SnapshotRequest& request) {
  OpenImage image(graph, request.image, {.writable = true, .trusted = true});
  block::Node& node = image.edge().node();
  try {
    carry_out(node.snapshots(), request);
  } catch (Error& e) {
    e.prepend(fmt::format("Could not {} snapshot '{}'", request.action, request.name));
    throw;
  }
  image.close();
}

}  // namespace

int run_image_snapshot(const po::variables_map& values) {
  const SnapshotRequest request = read_request(values);
  if (request.action == "nothing") return 0;
  ImageGraph graph;
  graph.run([&] {
    if (request.action == "list") {
      list_snapshots(graph, request);
    } else {
      change_snapshots(graph, request);
    }
  });
  return 0;
}

}  // namespace minivmm::cli
