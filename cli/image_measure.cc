// SPDX-License-Identifier: Apache-2.0
// minivmm image measure
#include <algorithm>
#include <cerrno>
#include <optional>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/formats/qcow2/create.h"
#include "block/jobs/chain_status.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_create_file.h"
#include "cli/image_facts.h"
#include "cli/image_measure_sizes.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_measure_syntax() {
  return image_syntax(
      "Usage: minivmm image measure [-O FORMAT] [-o OPTIONS] [--size SIZE | FILE]\n\n"
      "Says how large the file of a new image will be: with the content of FILE, and with every\n"
      "cluster in use.\n\n"
      "Examples:\n"
      "  minivmm image measure -O qcow2 disk.img\n"
      "  minivmm image measure -O qcow2 -o cluster_size=2M --size 1T\n\n",
      {
          {"output-format,O", "FORMAT", "the new image's format: qcow2 or raw (the default)"},
          {"options,o", "NAME=VALUE,...", "options of the new image, as of `image create`"},
          {"size", "SIZE", "of a new, empty disk, instead of a file's"},
          {"snapshot,l", "SNAPSHOT",
           "of a snapshot and not of the disk: its number or name, or "
           "snapshot.id=ID,snapshot.name=NAME"},
      },
      "sfoiU");
}

namespace {

struct Measured {
  uint64_t required = 0;
  uint64_t full = 0;
  std::optional<uint64_t> bitmaps;
};

struct MeasureRequest {
  std::string format = "raw";  // of the new image
  CreateOptionList options{"raw"};
  std::optional<uint64_t> size;
  ImageName image;
  NodeOptions snapshot;
  OutputFormat output = OutputFormat::kHuman;
};

MeasureRequest read_request(const po::variables_map& values) {
  MeasureRequest out;
  out.output = output_format(values);
  const Strings names = given_names(values);
  out.size = size_value(values, "size", "image size");
  if (const auto snapshot = optional_text(values, "snapshot")) {
    out.snapshot = snapshot_options(*snapshot);
  }
  if (names.empty() &&
      (!out.snapshot.empty() || values.count("format") != 0 || is_set(values, "image-opts"))) {
    throw Error(EINVAL, "--image-opts, -f, and -l require a filename argument.");
  }
  if (names.size() > 1) throw Error(EINVAL, "At most one filename argument is allowed.");
  if (out.size && !names.empty()) {
    throw Error(EINVAL, "--size N cannot be used together with a filename.");
  }
  if (!out.size && names.empty()) {
    throw Error(EINVAL, "Either --size N or one filename must be specified.");
  }
  if (values.count("output-format") != 0) out.format = text_value(values, "output-format");
  if (!is_format(out.format)) {
    throw Error(EINVAL, fmt::format("Unknown file format '{}'", out.format));
  }
  out.options = CreateOptionList(out.format);
  try {
    for (const std::string& text : text_values(values, "options")) out.options.parse(text);
  } catch (const Error& e) {
    throw Error(EINVAL, two_messages(e.what(), fmt::format("Invalid options for file format '{}'",
                                                           out.format)));
  }
  if (!names.empty()) {
    out.image = named_image(values, names[0]);
  }
  return out;
}

Qcow2Shape shape_of(const CreateOptionList& options) {
  Qcow2Shape out;
  if (options.has("cluster_size")) {
    out.cluster_size = block::parse_size(options.get("cluster_size"), "cluster_size");
  }
  if (options.has("refcount_bits")) {
    out.refcount_bits = static_cast<unsigned>(std::stoul(options.get("refcount_bits")));
  }
  out.extended_l2 = options.get("extended_l2") == "on";
  // Throws for what cannot be created.
  block::Options wanted = options.for_driver();
  const auto created = block::qcow2::take_create_options(wanted);
  block::qcow2::check_create_options(created);
  if (created.luks) out.luks_bytes = block::crypto::luks1_header_bytes(*created.luks);
  return out;
}

// Bytes of whole clusters in which the disk holds data. Fiber.
uint64_t used_clusters(block::Edge& disk, uint64_t size, uint64_t cluster) {
  const block::LayerChain chain(disk);
  uint64_t bytes = 0;
  for (uint64_t at = 0; at < size;) {
    if (at >= disk.size()) break;  // the rest of a raw disk's last sector
    const block::ChainStatus status = chain.status(at, disk.size() - at);
    uint64_t end = at + status.length;
    if (status.data && !status.zero) {
      end = base::align_up(end, cluster);
      bytes += end - base::align_down(at, cluster);
    }
    at = end;
  }
  return bytes;
}

Measured measure(const MeasureRequest& request, block::Edge* disk, uint64_t size) {
  Measured out;
  if (request.format == "raw") {
    out.required = out.full = base::align_up<uint64_t>(size, 512);
    return out;
  }
  if (request.format == "luks") {
    const uint64_t header = block::crypto::luks1_header_bytes(luks_options(request.options).crypto);
    out.required = out.full = header + base::align_up<uint64_t>(size, 512);
    return out;
  }
  const Qcow2Shape shape = shape_of(request.options);
  const uint64_t data = base::align_up(size, shape.cluster_size);
  const std::string preallocation = request.options.get("preallocation");
  // With a backing file named, what of the source is not copied is not known.
  const bool all = preallocation == "full" || preallocation == "falloc" ||
                   (disk != nullptr && request.options.has("backing_file"));
  out.full = full_qcow2_size(data, shape);
  uint64_t used = all ? data : 0;
  if (!all && disk != nullptr) used = used_clusters(*disk, size, shape.cluster_size);
  out.required = out.full - data + std::min(used, data);
  return out;
}

void print(const Measured& measured, OutputFormat output) {
  if (output == OutputFormat::kJson) {
    const std::string bitmaps =
        measured.bitmaps ? fmt::format("    \"bitmaps\": {},\n", *measured.bitmaps) : "";
    fmt::print("{{\n{}    \"required\": {},\n    \"fully-allocated\": {}\n}}\n", bitmaps,
               measured.required, measured.full);
    return;
  }
  fmt::print("required size: {}\nfully allocated size: {}\n", measured.required, measured.full);
  if (measured.bitmaps) fmt::print("bitmaps size: {}\n", *measured.bitmaps);
}

// As qemu-img counts them: of qcow2 images version 3 with bitmaps that could be copied, each one's
// table and clusters, at most.
std::optional<uint64_t> bitmap_bytes(const ImageFacts& facts, const Qcow2Shape& shape) {
  if (!facts.qcow2 || facts.qcow2->version < 3) return std::nullopt;
  uint64_t bytes = 0;
  uint64_t directory = 0;
  for (const auto& bitmap : facts.bitmaps) {
    const uint64_t granules =
        base::div_ceil(facts.virtual_size, uint64_t{1} << bitmap.granularity_bits);
    const uint64_t clusters =
        base::div_ceil(base::div_ceil<uint64_t>(granules, 8), shape.cluster_size);
    bytes += clusters * shape.cluster_size;
    bytes += base::align_up(clusters * 8, shape.cluster_size);
    directory += base::align_up<uint64_t>(24 + bitmap.name.size(), 8);
  }
  return bytes + base::align_up(directory, shape.cluster_size);
}

}  // namespace

int run_image_measure(const po::variables_map& values) {
  if (print_create_options(values, optional_text(values, "output-format").value_or("raw"))) {
    return 0;
  }
  const MeasureRequest request = read_request(values);
  Measured measured;
  if (request.size) {
    measured = measure(request, nullptr, *request.size);
  } else {
    Sandbox sandbox(values, {request.image}, Sandbox::Backing::kIfTrusted);
    const OpenMode mode = sandbox.open_mode(
        {.force_share = is_set(values, "force-share"), .snapshot = request.snapshot});
    sandbox.run([&](ImageGraph& graph) {
      OpenImage image(graph, request.image, mode);
      measured = measure(request, &image.edge(), image.size());
      if (request.format != "qcow2" || image.format() != "qcow2") return;
      const std::string file = image.edge().node().filename();
      image.close();
      const ImageFacts facts = inspect_image(graph, file, "qcow2", {.locked = false});
      const std::string compat = request.options.get("compat");
      if (compat == "0.10" || compat == "v2") return;  // there will be none
      measured.bitmaps = bitmap_bytes(facts, shape_of(request.options));
    });
  }
  print(measured, request.output);
  return 0;
}

}  // namespace minivmm::cli
