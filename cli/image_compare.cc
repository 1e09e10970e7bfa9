// SPDX-License-Identifier: Apache-2.0
// minivmm image compare
#include <algorithm>
#include <cerrno>
#include <cstdio>

#include <fmt/core.h>

#include "base/error.h"
#include "block/jobs/compare_job.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_loops.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::CompareJob;
using block::Difference;
using Strings = std::vector<std::string>;

namespace {

constexpr int kDifferent = 1;
constexpr int kFailed = 2;
constexpr int kStatusFailed = 3;
constexpr int kReadFailed = 4;

}  // namespace

ImageSyntax image_compare_syntax() {
  return image_syntax(
      "Usage: minivmm image compare [options] FILE1 FILE2\n\n"
      "Compares what two images contain; formats and how they are stored do not matter, and the "
      "longer\n"
      "one must be zero past the end of the shorter one. With -s sizes and what is allocated must "
      "be\n"
      "the same, too.\n\n"
      "Exit status: 0 identical, 1 different, 2 or more: it could not be found out.\n\n"
      "Examples:\n"
      "  minivmm image compare disk.img disk.qcow2\n"
      "  minivmm image compare -f raw -F qcow2 -p disk.img disk.qcow2\n\n",
      {
          {"second-format,F", "FORMAT", "the second image's format"},
          {"strict,s", nullptr, "sizes and allocation must be the same as well"},
      },
      "fTipqU");
}

namespace {

struct CompareRequest {
  ImageName first;
  ImageName second;
  OpenMode mode;
  bool strict = false;
  bool progress = false;
  bool quiet = false;
};

CompareRequest read_request(const po::variables_map& values) {
  CompareRequest out;
  const Strings names = given_names(values);
  if (names.size() != 2) throw UsageError{"Expecting two image file names"};
  out.first = named_image(values, names[0]);
  out.second = named_image(values, names[1], "second-format");
  out.mode.force_share = is_set(values, "force-share");
  out.mode.cache = source_cache(values);
  out.strict = is_set(values, "strict");
  out.progress = is_set(values, "progress");
  out.quiet = is_set(values, "quiet");
  return out;
}

void say(const CompareRequest& request, const std::string& text) {
  if (request.quiet) return;
  fmt::print("{}\n", text);
  std::fflush(stdout);
}

int tell(const CompareRequest& request, const std::optional<Difference>& found) {
  if (!found) {
    say(request, "Images are identical.");
    return 0;
  }
  const bool content = found->kind == Difference::Kind::kContent;
  say(request, content
                   ? fmt::format("Content mismatch at offset {}!", found->offset)
                   : fmt::format("Strict mode: Offset {} block status mismatch!", found->offset));
  return kDifferent;
}

// Fiber.
int compare(ImageGraph& graph, const CompareRequest& request) {
  OpenImage first(graph, request.first, request.mode);
  OpenImage second(graph, request.second, request.mode);
  if (first.size() != second.size() && request.strict) {
    say(request, "Strict mode: Image size mismatch!");
    return kDifferent;
  }
  CompareJob job({&first.edge(), request.first.text, first.size()},
                 {&second.edge(), request.second.text, second.size()}, request.strict);
  std::optional<Difference> found;
  {
    ProgressMeter meter(
        ProgressMeter::choose(request.progress, request.quiet),
        [&] {
          return ProgressState{job.done(), job.size(), job.done()};
        },
        [&] { job.cancel(); });
    found = job.run(graph.loops(), 0);
    // qemu-img's progress ends where it stopped; only what was compared to the end is at 100%.
    if (!found) meter.finish();
  }
  // Where what both have is the same.
  const uint64_t shorter = std::min(first.size(), second.size());
  if (first.size() != second.size() && (!found || found->offset >= shorter)) {
    say(request, "Warning: Image size mismatch!");
  }
  return tell(request, found);
}

int status_of(const Error& error) {
  const std::string text = error.what();
  if (text.starts_with("Sector allocation test failed")) return kStatusFailed;
  if (text.starts_with("Error while reading")) return kReadFailed;
  return kFailed;
}

}  // namespace

int run_image_compare(const po::variables_map& values) {
  // A status of 1 would mean that they differ.
  try {
    const CompareRequest request = read_request(values);
    ImageGraph graph({}, job_loops());
    return graph.run([&] { return compare(graph, request); });
  } catch (const Error& e) {
    print_error(e.what());
    end_by_stop_signal();
    return status_of(e);
  }
}

}  // namespace minivmm::cli
