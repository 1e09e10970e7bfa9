// SPDX-License-Identifier: Apache-2.0
// minivmm image commit
#include <cerrno>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "block/jobs/copy_job.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_header.h"
#include "cli/image_loops.h"
#include "cli/image_named_file.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_commit_syntax() {
  return image_syntax(
      "Usage: minivmm image commit [options] FILE\n\n"
      "Copies what an overlay holds into its backing file, or with -b into one further down, and "
      "then\n"
      "empties the overlay. Other overlays on that backing file are of no use afterwards.\n\n"
      "Examples:\n"
      "  minivmm image commit overlay.qcow2\n"
      "  minivmm image commit -d overlay.qcow2              # the overlay is not needed any more\n"
      "  minivmm image commit -b base.qcow2 third.qcow2     # the whole chain\n\n",
      {
          {"base,b", "FILE", "the file of the chain to copy into (implies -d)"},
          {"drop,d", nullptr, "do not empty the overlay afterwards: it is to be deleted"},
          {"rate,r", "BYTES", "bytes of data a second, at most"},
          {"backing-root", "DIR",
           "where backing files that images name may lie, besides the image's own directory"},
      },
      "ftipq");
}

namespace {

struct CommitRequest {
  ImageName image;
  NamedFile file;
  std::string base;
  CacheMode cache;
  uint64_t rate = 0;
  bool drop = false;
  bool progress = false;
  bool quiet = false;
};

CommitRequest read_request(const po::variables_map& values) {
  CommitRequest out;
  out.image = one_image(values);
  out.file = named_path(out.image);
  out.base = text_value(values, "base");
  out.cache = target_cache(values, "writeback");
  out.rate = size_value(values, "rate", "rate limit").value_or(0);
  out.drop = is_set(values, "drop") || !out.base.empty();
  out.progress = is_set(values, "progress");
  out.quiet = is_set(values, "quiet");
  return out;
}

// The place in the chain of what is copied into.
size_t find_base(const std::vector<ChainLink>& chain, const CommitRequest& request) {
  if (chain.size() < 2) throw Error(EINVAL, "Image does not have a backing file");
  if (request.base.empty()) return 1;
  for (size_t i = 1; i < chain.size(); ++i) {
    const bool named = chain[i - 1].recorded_name == request.base;
    if (named || same_file(chain[i].path, request.base) ||
        same_file(chain[i].path, path_from_image(chain[i - 1].path, request.base))) {
      return i;
    }
  }
  throw Error(EINVAL, fmt::format("Did not find '{}' in the backing chain of '{}'", request.base,
                                  request.image.text));
}

ImageName name_of(const ChainLink& link) {
  return {.text = link.path, .format = link.format, .inode = link.inode};
}

void copy_down(ImageGraph& graph, const std::vector<ChainLink>& chain, size_t base_at,
               const CommitRequest& request) {
  std::vector<std::unique_ptr<OpenImage>> layers;
  std::vector<block::Edge*> edges;
  for (size_t i = 0; i < base_at; ++i) {
    layers.push_back(
        std::make_unique<OpenImage>(graph, i == 0 ? request.image : name_of(chain[i]),
                                    OpenMode{.with_backing = false, .cache = request.cache}));
    edges.push_back(&layers.back()->edge());
  }
  OpenImage base(graph, name_of(chain[base_at]), {.writable = true, .cache = request.cache});
  if (base.edge().size() < edges[0]->size()) base.edge().truncate(edges[0]->size());
  block::LayersSource source(std::move(edges));
  block::CopyJob job(source, request.image.text, base.edge(), base.name(), {.rate = request.rate});
  const auto style = ProgressMeter::choose(request.progress, request.quiet);
  const bool shown = style != ProgressMeter::Style::kNone;
  const uint64_t total = shown ? block::count_data(source) : source.size();
  ProgressMeter meter(
      style,
      [&] {
        return ProgressState{shown ? job.data_done() : job.done(), total, job.data_done()};
      },
      [&] { job.cancel(); });
  job.run(graph.loops());
  base.close();
  meter.finish();
}

// Fiber.
void commit(ImageGraph& graph, const CommitRequest& request) {
  const std::string& path = request.file.path;
  std::vector<ChainLink> chain;
  try {
    chain = find_chain(graph, {path, request.file.format}, {.writable = true});
  } catch (Error& e) {
    refuse_open(e, path, request.image.text, true);
  }
  if (request.file.format.empty() && chain[0].format == "raw") warn_of_guess(request.image.text);
  const size_t base_at = find_base(chain, request);
  try {
    copy_down(graph, chain, base_at, request);
  } catch (Error& e) {
    // The overlay still shows what it did: what it holds covers what is in its backing file now.
    e.prepend("The commit was not completed; the overlay is unchanged");
    throw;
  }
  if (!request.drop && !replace_by_empty(graph, path)) {
    print_warning(
        fmt::format("{}: everything is in its backing file now, but the image itself "
                    "could not be emptied",
                    request.image.text));
  }
}

}  // namespace

int run_image_commit(const po::variables_map& values) {
  const CommitRequest request = read_request(values);
  block::OpenPolicy policy;
  policy.backing_roots = text_values(values, "backing-root");
  ImageGraph graph(policy, job_loops());
  graph.run([&] { commit(graph, request); });
  if (!request.quiet) fmt::print("Image committed.\n");
  return 0;
}

}  // namespace minivmm::cli
