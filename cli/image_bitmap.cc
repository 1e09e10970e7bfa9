// SPDX-License-Identifier: Apache-2.0
// minivmm image bitmap
#include <cerrno>
#include <optional>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/dirty_bitmaps.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::DirtyBitmaps;
using Strings = std::vector<std::string>;

ImageSyntax image_bitmap_syntax() {
  return image_syntax(
      "Usage: minivmm image bitmap ACTION... [options] FILE BITMAP\n\n"
      "Changes a persistent dirty bitmap of a qcow2 image, which notes what is written to the "
      "disk\n"
      "since some moment. Actions: --add, --remove, --clear, --enable, --disable, --merge; "
      "several\n"
      "are carried out in the order in which they are given.\n\n"
      "Examples:\n"
      "  minivmm image bitmap --add -g 64k disk.qcow2 backup0\n"
      "  minivmm image bitmap --disable disk.qcow2 backup0\n"
      "  minivmm image bitmap --merge backup0 --clear disk.qcow2 backup1\n\n",
      {
          {"add", nullptr, "a new one, which notes writes from now on"},
          {"remove", nullptr, "forget it, also if it is inconsistent"},
          {"clear", nullptr, "nothing counts as written"},
          {"enable", nullptr, "note writes from now on"},
          {"disable", nullptr, "note no writes from now on"},
          {"merge", "SOURCE", "add what another bitmap has noted"},
          {"granularity,g", "SIZE",
           "how many bytes of the disk a bit stands for, with --add; the cluster size, from 4k to "
           "64k, otherwise"},
          {"source-file,b", "FILE", "the image that has the bitmap to merge, if not this"},
          {"source-format,F", "FORMAT", "its format"},
      },
      "fi");
}

namespace {

struct Action {
  std::string name;
  std::string source;  // of a merge
};

// As they are given: their order counts.
std::vector<Action> read_actions(const po::variables_map& values) {
  std::vector<Action> out;
  const Strings sources = text_values(values, "merge");
  size_t merges = 0;
  for (const std::string& option : text_values(values, kGivenOptions)) {
    if (option == "merge") {
      out.push_back({option, sources[merges++]});
    } else if (option == "add" || option == "remove" || option == "clear" || option == "enable" ||
               option == "disable") {
      out.push_back({option, {}});
    }
  }
  return out;
}

struct BitmapRequest {
  std::vector<Action> actions;
  ImageName image;
  std::string bitmap;
  std::optional<ImageName> source;
  uint64_t granularity = 0;
};

BitmapRequest read_request(const po::variables_map& values) {
  BitmapRequest out;
  out.actions = read_actions(values);
  out.granularity = size_value(values, "granularity", "granularity").value_or(0);
  const Strings names = given_names(values);
  if (names.size() != 2) throw Error(EINVAL, "Expecting filename and bitmap name");
  out.image = named_image(values, names[0]);
  out.bitmap = names[1];
  if (out.actions.empty()) {
    throw Error(EINVAL,
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
  }
  if (values.count("granularity") != 0) {
    if (!is_set(values, "add")) throw Error(EINVAL, "granularity only supported with --add");
    if (out.granularity == 0) out.granularity = 1;  // not "the default"
  }
  if (values.count("source-file") != 0) {
    out.source = ImageName{text_value(values, "source-file"), text_value(values, "source-format")};
  } else if (values.count("source-format") != 0) {
    throw Error(EINVAL, "-F only supported with -b");
  }
  if (out.source && values.count("merge") == 0) {
    throw Error(EINVAL, "Merge bitmap source file only supported with --merge");
  }
  return out;
}

// An image without any.
[[noreturn]] void refuse_without_bitmaps(const Action& action, const std::string& bitmap,
                                         const block::Node& node) {
  if (action.name != "add") throw Error(ENOENT, fmt::format("Dirty bitmap '{}' not found", bitmap));
  throw Error(ENOTSUP, fmt::format("Can't store persistent bitmaps to {}: Operation not supported",
                                   node.name()));
}

void carry_out(const Action& action, const BitmapRequest& request, block::Node& node,
               DirtyBitmaps* source) {
  DirtyBitmaps* const bitmaps = node.dirty_bitmaps();
  if (bitmaps == nullptr) refuse_without_bitmaps(action, request.bitmap, node);
  const std::string& name = request.bitmap;
  if (action.name == "add") {
    try {
      bitmaps->add(name, request.granularity, true);
    } catch (Error& e) {
      if (e.err() == ENOTSUP) {
        e.prepend(fmt::format("Can't make bitmap '{}' persistent in '{}'", name, node.name()));
      }
      throw;
    }
  } else if (action.name == "remove") {
    bitmaps->remove(name);
  } else if (action.name == "clear") {
    bitmaps->clear(name);
  } else if (action.name == "merge") {
    if (source == nullptr) {
      throw Error(ENOENT, fmt::format("Dirty bitmap '{}' not found", action.source));
    }
    bitmaps->merge(name, *source, action.source);
  } else {
    bitmaps->set_enabled(name, action.name == "enable");
  }
}

// Fiber.
void change_bitmap(ImageGraph& graph, const BitmapRequest& request) {
  OpenImage image(graph, request.image, {.writable = true, .trusted = true});
  std::optional<OpenImage> source;
  if (request.source) source.emplace(graph, *request.source, OpenMode{.with_backing = false});
  block::Node& node = image.edge().node();
  for (const Action& action : request.actions) {
    block::Node& from = source ? source->edge().node() : node;
    try {
      carry_out(action, request, node, from.dirty_bitmaps());
    } catch (Error& e) {
      e.prepend(fmt::format("Operation {} on bitmap {} failed", action.name, request.bitmap));
      const std::string text = e.what();
      if (text.find("inconsistent") == std::string::npos) throw;
      throw Error(e.err(), text + (personality().drop_in
                                       ? "\nTry block-dirty-bitmap-remove to delete this bitmap "
                                         "from disk"
                                       : "; it missed writes, and --remove is all that can be "
                                         "done to it"));
    }
  }
  if (source) source->close();
  image.close();
}

}  // namespace

int run_image_bitmap(const po::variables_map& values) {
  const BitmapRequest request = read_request(values);
  ImageGraph graph;
  graph.run([&] { change_bitmap(graph, request); });
  return 0;
}

}  // namespace minivmm::cli
