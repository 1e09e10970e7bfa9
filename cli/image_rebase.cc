// SPDX-License-Identifier: Apache-2.0
// minivmm image rebase
#include <cerrno>
#include <memory>
#include <optional>

#include <fmt/core.h>

#include "base/error.h"
#include "block/jobs/rebase_job.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_facts.h"
#include "cli/image_header.h"
#include "cli/image_loops.h"
#include "cli/image_named_file.h"
#include "cli/image_open.h"
#include "cli/image_progress.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::LayerChain;
using block::RebaseJob;
using block::RebaseNodes;
using Strings = std::vector<std::string>;

ImageSyntax image_rebase_syntax() {
  return image_syntax(
      "Usage: minivmm image rebase [options] -b BACKING -F FORMAT FILE\n\n"
      "Gives an overlay another backing file. What it shows stays the same: what the new backing\n"
      "file has differently is copied from the old one into the overlay first. With -u only the "
      "name\n"
      "is changed, which is right where the file was renamed or moved. An empty BACKING: none.\n\n"
      "Examples:\n"
      "  minivmm image rebase -b base2.qcow2 -F qcow2 overlay.qcow2\n"
      "  minivmm image rebase -u -b ../images/base.qcow2 -F qcow2 overlay.qcow2\n"
      "  minivmm image rebase -b '' overlay.qcow2          # needs no other file any more\n\n",
      {
          {"backing,b", "FILE", "the new backing file, as it is recorded; '': none"},
          {"backing-format,F", "FORMAT", "its format"},
          {"unsafe,u", nullptr, "only change the name"},
          {"backing-root", "DIR",
           "where backing files that images name may lie, besides the image's own directory"},
      },
      "ftTipqU");
}

namespace {

struct RebaseRequest {
  ImageName image;
  OpenMode mode;
  CacheMode source_cache;
  std::string backing;
  std::string backing_format;
  std::string backing_path;  // where it is; empty: none
  bool unsafe = false;
  bool progress = false;
  bool quiet = false;
};

RebaseRequest read_request(const po::variables_map& values) {
  RebaseRequest out;
  out.image = one_image(values);
  out.unsafe = is_set(values, "unsafe");
  if (!out.unsafe && values.count("backing") == 0) {
    throw UsageError{"Must specify backing file (-b) or use unsafe mode (-u)"};
  }
  out.backing = text_value(values, "backing");
  out.backing_format = text_value(values, "backing-format");
  out.mode.writable = true;
  out.mode.cache = target_cache(values, "writeback");
  out.source_cache = source_cache(values);
  out.mode.with_backing = !out.unsafe;
  out.progress = is_set(values, "progress");
  out.quiet = is_set(values, "quiet");
  if (!out.backing.empty()) {
    out.backing_path = host_path(path_from_image(named_file(out.image).path, out.backing));
  }
  return out;
}

// What must be right before anything is written.
void check(OpenImage& overlay, const RebaseRequest& request) {
  const auto refuse = [&](int err, const char* why) {
    return Error(
        err, fmt::format("Could not change the backing file to '{}': {}", request.backing, why));
  };
  if (overlay.format() != "qcow2") throw refuse(ENOTSUP, "Operation not supported");
  if (request.backing.empty()) return;
  if (request.backing_format.empty()) {
    throw refuse(EINVAL, "backing format must be specified");
  }
  if (!is_format(request.backing_format)) {
    throw Error(EINVAL, fmt::format("Invalid format name: '{}'", request.backing_format));
  }
}

std::unique_ptr<OpenImage> open_new_backing(ImageGraph& graph, const RebaseRequest& request,
                                            block::Edge& overlay) {
  if (request.backing_path.empty()) return nullptr;
  // What is open already is not opened in another way.
  const LayerChain chain(overlay);
  CacheMode cache = request.source_cache;
  for (size_t i = 1; i < chain.size(); ++i) {
    if (same_file(chain.layer(i).node().filename(), request.backing_path)) {
      cache = request.mode.cache;
    }
  }
  try {
    // It is the user's word, and so is what it names itself.
    return std::make_unique<OpenImage>(
        graph, ImageName{request.backing_path, request.backing_format},
        OpenMode{.force_share = request.mode.force_share, .trusted = true, .cache = cache});
  } catch (const Error& e) {
    constexpr std::string_view kOpen = "Could not open ";
    std::string text = e.what();
    if (text.starts_with(kOpen)) text.replace(0, kOpen.size(), "Could not open new backing file ");
    throw Error(e.err(), text);
  }
}

void copy_differences(ImageGraph& graph, OpenImage& overlay, OpenImage* new_backing,
                      const RebaseRequest& request) {
  const LayerChain chain(overlay.edge());
  RebaseNodes nodes{.overlay = &overlay.edge()};
  if (chain.size() > 1) nodes.old_backing = &chain.layer(1);
  if (new_backing != nullptr) nodes.new_backing = &new_backing->edge();
  for (size_t i = 1; i < chain.size() && !request.backing_path.empty(); ++i) {
    if (same_file(chain.layer(i).node().filename(), request.backing_path)) {
      nodes.common = static_cast<uint32_t>(i - 1);
    }
  }
  RebaseJob job(nodes, request.image.text);
  ProgressMeter meter(
      ProgressMeter::choose(request.progress, request.quiet),
      [&] {
        return ProgressState{job.done(), job.size(), job.done()};
      },
      [&] { job.cancel(); });
  job.run(graph.loops());
  // What was copied is in its place before the name changes.
  overlay.edge().flush();
  meter.finish();
}

// Fiber.
void rebase(ImageGraph& graph, const RebaseRequest& request) {
  OpenImage overlay(graph, request.image, request.mode);
  check(overlay, request);
  const std::string file = overlay.edge().node().filename();
  if (!request.unsafe) {
    const std::unique_ptr<OpenImage> new_backing = open_new_backing(graph, request, overlay.edge());
    copy_differences(graph, overlay, new_backing.get(), request);
  }
  overlay.close();
  change_backing_name(graph, file, request.backing, request.backing_format);
  if (request.unsafe) {  // there was nothing to wait for
    ProgressMeter meter(
        ProgressMeter::choose(request.progress, request.quiet), [] { return ProgressState{}; },
        [] {});
    meter.finish();
  }
}

}  // namespace

int run_image_rebase(const po::variables_map& values) {
  const RebaseRequest request = read_request(values);
  block::OpenPolicy policy;
  policy.backing_roots = text_values(values, "backing-root");
  ImageGraph graph(policy, request.unsafe ? 1 : job_loops());
  graph.run([&] { rebase(graph, request); });
  return 0;
}

}  // namespace minivmm::cli
