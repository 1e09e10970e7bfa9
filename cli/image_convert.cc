// SPDX-License-Identifier: Apache-2.0
// minivmm image convert
#include <sys/stat.h>
#include <sys/statfs.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "base/nbd_uri.h"
#include "block/jobs/chain_status.h"
#include "block/jobs/copy_job.h"
#include "cli/command.h"
#include "cli/image_commands.h"
#include "cli/image_convert_bitmaps.h"
#include "cli/image_convert_options.h"
#include "cli/image_loops.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"
#include "cli/image_target.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::ConcatSource;
using block::CopyJob;
using block::CopyOptions;
using block::CopySource;
using block::DiskSource;
using Strings = std::vector<std::string>;

namespace {

// The sources, open, as one.
struct Sources {
  std::vector<std::unique_ptr<OpenImage>> images;
  std::vector<std::unique_ptr<DiskSource>> disks;
  std::unique_ptr<ConcatSource> all;
  uint64_t size = 0;
};

// How many layers of the first source lie above the file that the new image has for its backing
// file: those are copied. Where it is not in the chain, the user vouches that it is what lies below
// the uppermost one.
uint32_t depth_above(OpenImage& image, const std::string& backing) {
  uint32_t depth = 0;
  for (block::Edge* edge = &image.edge(); edge != nullptr; ++depth) {
    if (depth > 0 && same_file(edge->node().filename(), backing)) return depth;
    edge = block::backing_edge(edge->node());
  }
  return 1;
}

void open_sources(ImageGraph& graph, const ConvertRequest& request, Sources& out) {
  if (request.sources.size() > 1 && !request.snapshot.empty()) {
    throw Error(EINVAL, "No support for concatenating multiple snapshot");
  }
  if (request.sources.size() > 1 && request.bitmaps) {
    throw Error(EINVAL, "Copying bitmaps only possible with single source");
  }
  for (const ImageName& name : request.sources) {
    const OpenMode mode{.force_share = request.force_share,
                        .cache = request.source_cache,
                        .snapshot = request.snapshot};
    out.images.push_back(std::make_unique<OpenImage>(graph, name, mode));
  }
  std::string backing;
  if (request.backing) backing = path_from_image(host_path(request.target), *request.backing);
  std::vector<CopySource*> parts;
  for (const auto& image : out.images) {
    const uint32_t depth = request.backing ? depth_above(*image, backing) : DiskSource::kWholeChain;
    out.disks.push_back(std::make_unique<DiskSource>(image->edge(), image->size(), depth));
    parts.push_back(out.disks.back().get());
    out.size += image->size();
  }
  out.all = std::make_unique<ConcatSource>(std::move(parts));
}

std::unique_ptr<TargetImage> open_target(ImageGraph& graph, const ConvertRequest& request,
                                         uint64_t size) {
  // An NBD disk cannot be made: it is there, and large enough or not.
  const bool is_there = !request.target_is_options && base::is_nbd_uri(host_path(request.target));
  if (request.skip_create || is_there) {
    const ImageName name{request.target, request.target_is_options ? "" : request.target_format,
                         request.target_is_options};
    auto target = std::make_unique<TargetImage>(graph, name, request.target_cache);
    return target;
  }
  NewImage image;
  image.file_name = request.target;
  image.path = host_path(request.target);
  image.format = request.target_format;
  image.options = CreateOptionList(request.target_format);
  for (const std::string& text : request.create_options) image.options.parse(text);
  // Whatever -o says of it, as qemu-img.
  image.options.set("size", fmt::format("{}", size));
  set_backing(image, request.backing, request.backing_format);
  if (request.compress && request.target_format != "qcow2") {
    throw Error(ENOTSUP, "Compression not supported for this file format");
  }
  if (request.compress && image.options.encrypted()) {
    throw Error(EINVAL, "Compression and encryption not supported at the same time");
  }
  return std::make_unique<TargetImage>(graph, image, request.target_cache);
}

// File systems that share data between files instead of copying it.
bool shares_data(const std::string& from, const std::string& to) {
  constexpr long kBtrfs = 0x9123683e;
  constexpr long kXfs = 0x58465342;
  constexpr long kBcachefs = static_cast<long>(0xca451a4e);
  struct stat a {};
  struct stat b {};
  struct statfs system {};
  if (::stat(from.c_str(), &a) != 0 || ::stat(to.c_str(), &b) != 0) return false;
  if (!S_ISREG(a.st_mode) || !S_ISREG(b.st_mode) || a.st_dev != b.st_dev) return false;
  if (::statfs(to.c_str(), &system) != 0) return false;
  return system.f_type == kBtrfs || system.f_type == kXfs || system.f_type == kBcachefs;
}

// Bytes a request of a copy that is compressed.
constexpr uint64_t kCompressRequest = 128 * 1024;

CopyOptions copy_options(const ConvertRequest& request, Sources& sources, TargetImage& target) {
  CopyOptions out;
  out.requests = request.requests;
  out.zero_bytes = request.zero_bytes;
  out.target_is_zero = target.is_zero() || request.target_is_zero;
  out.rate = request.rate;
  if (request.compress) {
    const uint32_t cluster = target.edge().node().limits().compress_unit;
    if (cluster == 0) {
      throw Error(ENOTSUP, "Compression not supported for this file format");
    }
    out.compressed_cluster = cluster;
    // Reading takes no time beside compressing, memory it does.
    out.request = std::max<uint64_t>(cluster, kCompressRequest);
  }
  const bool shared =
      sources.images.size() == 1 && request.zero_bytes != 0 && !request.compress &&
      shares_data(sources.images[0]->edge().node().filename(), target.edge().node().filename());
  out.copy_range = request.copy_range || shared;
  constexpr uint64_t kLargestCluster = 2 << 20;
  const uint64_t unit = target.edge().node().limits().optimal_io;
  out.copy_unit = std::clamp<uint64_t>(unit, 1, kLargestCluster);
  if (request.salvage) {
    const bool quiet = request.quiet;
    out.tolerate = [quiet](uint64_t offset, uint64_t, const Error& e) {
      if (!quiet) print_warning(fmt::format("error while reading offset {}: {}", offset, e.what()));
      return true;
    };
  }
  return out;
}

// Fiber.
void convert(ImageGraph& graph, const ConvertRequest& request) {
  Sources sources;
  open_sources(graph, request, sources);
  if (request.bitmaps) {
    check_source_bitmaps(*sources.images.front(), request.skip_broken_bitmaps);
    const bool old = sets_option(request, "compat=0.10") || sets_option(request, "compat=v2");
    if (!request.skip_create && (request.target_format != "qcow2" || old)) {
      throw Error(ENOTSUP, fmt::format("Format driver '{}' does not support bitmaps",
                                       request.target_format));
    }
  }
  const std::unique_ptr<TargetImage> target = open_target(graph, request, sources.size);
  if (request.bitmaps) require_bitmaps(target->edge());
  if (target->image().size() < sources.size) {
    throw Error(ENOSPC, "output file is smaller than input file");
  }
  CopyJob job(*sources.all, request.sources.front().text, target->edge(), request.target,
              copy_options(request, sources, *target));
  const auto style = ProgressMeter::choose(request.progress, request.quiet);
  const bool shown = style != ProgressMeter::Style::kNone;
  const uint64_t total = shown ? block::count_data(*sources.all) : sources.size;
  {
    ProgressMeter meter(
        style,
        [&] {
          // To count data first is for who watches; SIGUSR1 is answered with how far it is.
          return ProgressState{shown ? job.data_done() : job.done(), total, job.data_done()};
        },
        [&] { job.cancel(); });
    target->begin();
    job.run(graph.loops());
    if (request.bitmaps) copy_bitmaps(*sources.images.front(), target->edge());
    target->finish();
    meter.finish();
  }
}

}  // namespace

int run_image_convert(const po::variables_map& values) {
  if (print_create_options(values, optional_text(values, "output-format").value_or("raw"), true))
    return 0;
  const ConvertRequest request = read_convert_request(values);
  ImageGraph graph({}, job_loops());
  graph.run([&] { convert(graph, request); });
  return 0;
}

}  // namespace minivmm::cli
