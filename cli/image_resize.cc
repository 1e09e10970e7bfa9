// SPDX-License-Identifier: Apache-2.0
// minivmm image resize
#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>

#include <fmt/core.h>

#include "base/error.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

namespace {

using block::Preallocation;

}  // namespace

ImageSyntax image_resize_syntax() {
  ImageSyntax out = image_syntax(
      "Usage: minivmm image resize [options] FILE [+|-]SIZE\n\n"
      "Makes the disk of an image larger or smaller: to SIZE, or by it. The guest's partitions "
      "and\n"
      "file systems are its own to resize: before the image shrinks, after it has grown.\n\n"
      "Examples:\n"
      "  minivmm image resize disk.qcow2 +10G\n"
      "  minivmm image resize -f raw --preallocation=falloc disk.img 20G\n"
      "  minivmm image resize --shrink disk.qcow2 8G\n\n",
      {
          {"shrink", nullptr, "a smaller size is meant: what lies past the new end is lost"},
          {"preallocation", "off|metadata|falloc|full",
           "what becomes of the new space: nothing is reserved (off), or the file's blocks are"},
      },
      "fiq");
  out.last_is_name = true;
  return out;
}

namespace {

struct ResizeRequest {
  ImageName image;
  uint64_t size = 0;
  int sign = 0;  // of a relative size
  bool shrink = false;
  bool quiet = false;
  Preallocation preallocation = Preallocation::kOff;
};

Preallocation read_preallocation(const po::variables_map& values) {
  constexpr const char* kNames[] = {"off", "metadata", "falloc", "full"};
  if (values.count("preallocation") == 0) return Preallocation::kOff;
  const std::string text = text_value(values, "preallocation");
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (text == kNames[i]) return static_cast<Preallocation>(i);
  }
  throw Error(EINVAL, fmt::format("Invalid preallocation mode '{}'", text));
}

void read_size(ResizeRequest& out, std::string text) {
  if (text.starts_with('+') || text.starts_with('-')) {
    out.sign = text.front() == '+' ? 1 : -1;
    text.erase(0, 1);
  }
  try {
    out.size = block::parse_size(text, "size");
  } catch (const Error&) {
    throw Error(EINVAL,
                "Parameter 'size' expects a non-negative number below 2^64\n"
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
                "and exabytes, respectively.");
  }
}

uint64_t new_size(const ResizeRequest& request, uint64_t old) {
  const uint64_t by = request.size;
  uint64_t size = by;
  if (request.sign > 0) size = by > block::kMaxDiskSize ? by : old + by;
  if (request.sign < 0) size = by >= old ? 0 : old - by;
  if (size == 0) throw Error(EINVAL, "New image size must be positive");
  if (size > block::kMaxDiskSize) {
    throw Error(EFBIG, fmt::format("the new size is more than any disk may have ({} bytes)",
                                   block::kMaxDiskSize));
  }
  return size;
}

void check(const ResizeRequest& request, uint64_t old, uint64_t size) {
  if (size >= old) return;
  if (request.preallocation != Preallocation::kOff) {
    throw Error(EINVAL, "Preallocation can only be used for growing images");
  }
  if (request.shrink) return;
  print_error("Use the --shrink option to perform a shrink operation.");
  throw Error(EINVAL,
              "warning: Shrinking an image will delete all data beyond the shrunken image's end. "
              "Before performing such an operation, make sure there is no important data there.");
}

// In qemu-img's words; the driver refuses it with more.
void refuse_old_snapshots(const block::Edge& disk) {
  const auto* image = dynamic_cast<const block::Qcow2Node*>(&disk.node());
  if (!personality().drop_in || image == nullptr) return;
  if (image->header().version >= 3 || image->header().snapshots == 0) return;
  throw Error(ENOTSUP, "Can't resize a v2 image which has snapshots");
}

// Fiber.
void resize(ImageGraph& graph, const ResizeRequest& request) {
  OpenImage image(graph, request.image, {.writable = true, .trusted = true});
  const uint64_t old = image.size();
  const uint64_t size = new_size(request, old);
  check(request, old, size);
  const bool raw = image.format() == "raw";
  if (!raw && size % 512 != 0) {
    throw Error(EINVAL, "The new size must be a multiple of 512");
  }
  if (request.preallocation == Preallocation::kMetadata && raw) {
    throw Error(ENOTSUP, "Unsupported preallocation mode: metadata");
  }
  block::Edge& disk = image.edge();
  if (size != disk.size()) {
    refuse_old_snapshots(disk);
    disk.truncate(size);
  }
  if (request.preallocation != Preallocation::kOff) {
    try {
      disk.preallocate(old, size - old, request.preallocation);
    } catch (...) {
      disk.truncate(old);
      throw;
    }
  }
  image.close();
}

}  // namespace

int run_image_resize(const po::variables_map& values) {
  const Strings names = given_names(values);
  if (names.size() < 2) throw UsageError{"Not enough arguments"};
  if (names.size() > 2) throw UsageError{"Expecting image file name and size"};
  ResizeRequest request;
  request.image = named_image(values, names[0]);
  request.shrink = is_set(values, "shrink");
  request.quiet = is_set(values, "quiet");
  request.preallocation = read_preallocation(values);
  read_size(request, names[1]);
  ImageGraph graph;
  graph.run([&] { resize(graph, request); });
  if (!request.quiet) fmt::print("Image resized.\n");
  return 0;
}

}  // namespace minivmm::cli
