// SPDX-License-Identifier: Apache-2.0
// minivmm image map
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <optional>

#include <fmt/core.h>

#include "base/error.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/jobs/chain_status.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_map_output.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

namespace {

// More ranges than that are not held in memory for a picture.
constexpr size_t kMostEntries = 4'000'000;

}  // namespace

ImageSyntax image_map_syntax() {
  return image_syntax(
      "Usage: minivmm image map [options] FILE\n\n"
      "Shows what ranges of a disk are stored where, layer by layer of its backing chain.\n\n"
      "Examples:\n"
      "  minivmm image map disk.qcow2\n"
      "  minivmm image map --trusted --output=json overlay.qcow2\n"
      "  minivmm image map --trusted --svg overlay.svg overlay.qcow2\n\n",
      {
          {"start-offset,s", "OFFSET", "begin there"},
          {"max-length,l", "LENGTH", "and go on for so many bytes"},
          {"svg", "FILE", "write a picture to FILE instead of a table"},
      },
      "sfoiU");
}

namespace {

// Calls use(entry) for the ranges of [begin, end), merged. Fiber.
template <typename Use>
void walk(block::Edge& disk, const std::string& name, bool backing_missing, uint64_t begin,
          uint64_t end, Use&& use) {
  const block::LayerChain chain(disk);
  std::vector<std::string> files;
  for (size_t i = 0; i < chain.size(); ++i) {
    files.push_back(block::data_filename(chain.layer(i).node()));
  }
  if (files[0].empty()) files[0] = name;
  std::optional<MapEntry> current;
  for (uint64_t at = begin; at < end;) {
    MapEntry entry{.start = at};
    if (at >= disk.size()) {  // the last sector of a raw disk is short
      entry.length = end - at;
      entry.present = entry.zero = true;
      entry.offset = at;
    } else {
      const block::ChainStatus status = chain.status(at, std::min(end, disk.size()) - at);
      entry.length = status.length;
      entry.depth = status.depth;
      entry.data = status.data;
      entry.present = status.present;
      entry.zero = status.zero;
      entry.compressed = status.compressed;
      entry.offset = status.host_offset;
      if (!status.present && backing_missing) {
        // It is in the backing file, which was not opened.
        entry.unknown = true;
        entry.zero = false;
        entry.depth = static_cast<uint32_t>(chain.size());
      }
    }
    if (entry.offset) entry.file = files[entry.depth];
    at += entry.length;
    if (current && merge(*current, entry)) continue;
    if (current) use(*current);
    current = std::move(entry);
  }
  if (current) use(*current);
}

struct MapRequest {
  ImageName image;
  OpenMode mode;
  OutputFormat output = OutputFormat::kHuman;
  uint64_t start = 0;
  uint64_t length = INT64_MAX;
  std::string svg;
};

void print_table(block::Edge& disk, const MapRequest& request, bool missing, uint64_t end) {
  fmt::print("{}", map_header());
  walk(disk, request.image.text, missing, request.start, end, [](const MapEntry& entry) {
    const std::string line = map_line(entry);
    if (!line.empty()) fmt::print("{}", line);
  });
  if (missing && !personality().drop_in) {
    print_error(
        fmt::format("what {} does not hold itself is in its backing file, which --trusted "
                    "opens",
                    printable(request.image.text)));
  }
}

void print_json(block::Edge& disk, const MapRequest& request, bool missing, uint64_t end) {
  const char* before = "[";
  if (request.start >= end) fmt::print("[{}", map_json(MapEntry{.start = request.start}));
  walk(disk, request.image.text, missing, request.start, end, [&](const MapEntry& entry) {
    fmt::print("{}{}", before, map_json(entry));
    before = ",\n";
  });
  fmt::print("]\n");
}

std::string draw(block::Edge& disk, const MapRequest& request, bool missing, uint64_t end) {
  std::vector<MapEntry> entries;
  walk(disk, request.image.text, missing, request.start, end, [&](const MapEntry& entry) {
    if (entries.size() >= kMostEntries) {
      throw Error(EFBIG, fmt::format("{}: has more than {} ranges; draw a part of it (-s, -l)",
                                     request.image.text, kMostEntries));
    }
    entries.push_back(entry);
  });
  const block::LayerChain chain(disk);
  Strings names;
  for (size_t i = 0; i < chain.size(); ++i) names.push_back(chain.layer(i).node().filename());
  if (missing) names.emplace_back("the backing file (not opened)");
  return map_svg(entries, names, end);
}

// True if the last image that was opened records a backing file, which was not.
bool backing_is_missing(OpenImage& image) {
  const block::LayerChain chain(image.edge());
  const auto* last = dynamic_cast<const block::Qcow2Node*>(&chain.layer(chain.size() - 1).node());
  return last != nullptr && last->header().has_backing;
}

}  // namespace

int run_image_map(const po::variables_map& values) {
  MapRequest request;
  request.output = output_format(values);
  request.image = one_image(values);
  request.start = size_value(values, "start-offset", "start offset").value_or(0);
  request.length = size_value(values, "max-length", "max length").value_or(INT64_MAX);
  request.svg = text_value(values, "svg");
  std::ofstream picture;
  if (!request.svg.empty()) {
    picture.open(request.svg);
    if (!picture) throw base::errno_error(errno, request.svg);
  }
  Sandbox sandbox(values, {request.image}, Sandbox::Backing::kIfTrusted);
  request.mode = sandbox.open_mode({.force_share = is_set(values, "force-share")});
  sandbox.run([&](ImageGraph& graph) {
    OpenImage image(graph, request.image, request.mode);
    const uint64_t end =
        std::min(image.size(), request.start + std::min<uint64_t>(request.length, INT64_MAX));
    const bool missing = backing_is_missing(image);
    if (!request.svg.empty()) {
      picture << draw(image.edge(), request, missing, end);
    } else if (request.output == OutputFormat::kJson) {
      print_json(image.edge(), request, missing, end);
    } else {
      print_table(image.edge(), request, missing, end);
    }
  });
  picture.flush();
  if (!request.svg.empty() && !picture) throw Error(EIO, request.svg + ": could not be written");
  return 0;
}

}  // namespace minivmm::cli
