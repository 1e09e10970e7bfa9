// SPDX-License-Identifier: Apache-2.0
// minivmm image check
#include <cerrno>
#include <cstdio>
#include <optional>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/repair.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_facts.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::qcow2::CheckResult;
using block::qcow2::Repair;
using Strings = std::vector<std::string>;

namespace {

// qemu-img's exit statuses.
constexpr int kFailed = 1;
constexpr int kCorrupt = 2;
constexpr int kLeaky = 3;
constexpr int kNoChecks = 63;

}  // namespace

ImageSyntax image_check_syntax() {
  return image_syntax(
      "Usage: minivmm image check [-f FORMAT] [-r leaks|all] [--output=human|json] [-q] [-U] "
      "FILE\n\n"
      "Counts every reference to every cluster of a qcow2 image and compares it with the image's "
      "own\n"
      "counts. Reads only, unless -r asks for repair; nothing that the image names is opened. What "
      "is\n"
      "wrong is printed line by line on standard error, a summary on standard output.\n\n"
      "`-r leaks` only frees space that is lost. `-r all` also mends entries that make no sense, "
      "the\n"
      "counts and the flags; what cannot be found any more reads as zeroes, so keep a copy. Cut "
      "short\n"
      "anywhere, it can be run again.\n\n"
      "Exit status: 0 clean, 1 the check could not be completed, 2 corruption was found, 3 leaked\n"
      "clusters (space that is lost, no harm to data), 63 the format has no checks.\n\n"
      "Examples:\n"
      "  minivmm image check disk.qcow2\n"
      "  minivmm image check --output=json disk.qcow2\n"
      "  minivmm image check -r all disk.qcow2\n\n",
      {
          {"repair,r", "leaks|all", "repair what is found: lost space, or everything"},
      },
      "sfToiqU");
}

namespace {

// None: check only.
std::optional<Repair> repair_mode(const po::variables_map& values) {
  if (values.count("repair") == 0) return std::nullopt;
  const std::string what = text_value(values, "repair");
  if (what != "leaks" && what != "all") {
    throw UsageError{
        fmt::format("Unknown option value for -r (expecting 'leaks' or 'all'): {}", what)};
  }
  if (is_set(values, "untrusted")) {
    throw UsageError{"-r writes to the image, which --untrusted does not allow"};
  }
  return what == "all" ? Repair::kAll : Repair::kLeaks;
}

struct Outcome {
  std::string format;
  std::optional<CheckResult> result;  // none: the format has no checks
  uint64_t leaks_fixed = 0;
  uint64_t corruptions_fixed = 0;
  bool repaired() const noexcept { return leaks_fixed != 0 || corruptions_fixed != 0; }
};

std::string json_text(const Outcome& outcome, const std::string& path) {
  const CheckResult& r = *outcome.result;
  nlohmann::ordered_json out;
  const auto add_unless_zero = [&](const char* name, uint64_t value) {
    if (value != 0) out[name] = value;
  };
  // qemu-img's keys and order; what is 0 it leaves out, except for the errors of the check itself.
  add_unless_zero("image-end-offset", r.image_end_offset);
  add_unless_zero("compressed-clusters", r.compressed_clusters);
  add_unless_zero("total-clusters", r.total_clusters);
  add_unless_zero("corruptions", r.corruptions);
  add_unless_zero("corruptions-fixed", outcome.corruptions_fixed);
  out["check-errors"] = r.check_errors;
  add_unless_zero("leaks-fixed", outcome.leaks_fixed);
  add_unless_zero("leaks", r.leaks);
  add_unless_zero("allocated-clusters", r.allocated_clusters);
  out["filename"] = path;
  out["format"] = outcome.format;
  add_unless_zero("fragmented-clusters", r.fragmented_clusters);
  return out.dump(4, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::string human_text(const CheckResult& r) {
  std::string out;
  if (r.corruptions == 0 && r.leaks == 0 && r.check_errors == 0) {
    out += "No errors were found on the image.\n";
  }
  if (r.corruptions != 0) {
    out += fmt::format(
        "\n{} errors were found on the image.\n"
        "Data may be corrupted, or further writes to the image may corrupt it.\n",
        r.corruptions);
  }
  if (r.leaks != 0) {
    out += fmt::format(
        "\n{} leaked clusters were found on the image.\n"
        "This means waste of disk space, but no harm to data.\n",
        r.leaks);
  }
  if (r.check_errors != 0) {
    out += fmt::format("\n{} internal errors have occurred during the check.\n", r.check_errors);
  }
  if (r.total_clusters != 0 && r.allocated_clusters != 0) {
    const auto percent = [](uint64_t part, uint64_t of) {
      return static_cast<double>(part) * 100.0 / static_cast<double>(of);
    };
    out += fmt::format(
        "{}/{} = {:.2f}% allocated, {:.2f}% fragmented, {:.2f}% compressed clusters\n",
        r.allocated_clusters, r.total_clusters, percent(r.allocated_clusters, r.total_clusters),
        percent(r.fragmented_clusters, r.allocated_clusters),
        percent(r.compressed_clusters, r.allocated_clusters));
  }
  if (r.image_end_offset != 0) out += fmt::format("Image end offset: {}\n", r.image_end_offset);
  return out;
}

int exit_status(const CheckResult& r) {
  if (r.check_errors != 0) return kFailed;
  if (r.corruptions != 0) return kCorrupt;
  return r.leaks != 0 ? kLeaky : 0;
}

std::string repaired_text(const Outcome& outcome) {
  return fmt::format(
      "The following inconsistencies were found and repaired:\n\n"
      "    {} leaked clusters\n"
      "    {} corruptions\n\n"
      "Double checking the fixed image now...\n",
      outcome.leaks_fixed, outcome.corruptions_fixed);
}

// Fiber.
Outcome check(block::Edge& file, const NamedFile& image, std::optional<Repair> repair) {
  Outcome out;
  out.format = image_format(file, image.path, image.format);
  if (repair && image.format.empty() && out.format == "raw") warn_of_guess(image.path);
  if (out.format != "qcow2") return out;
  const auto report = [](const std::string& line) { fmt::print(stderr, "{}\n", printable(line)); };
  try {
    if (!repair) {
      out.result = block::qcow2::check_image(file, report);
    } else {
      const auto done = block::qcow2::repair_image(file, *repair, report);
      out.result = done.left;
      out.leaks_fixed = done.leaks_fixed;
      out.corruptions_fixed = done.corruptions_fixed;
    }
  } catch (Error& e) {
    e.prepend(image.path);
    throw;
  }
  return out;
}

// What was found, as it was asked for; returns the exit status.
int tell(const Outcome& outcome, const std::string& path, OutputFormat output, bool quiet) {
  if (!outcome.result) {
    print_error("This image format does not support checks");
    return kNoChecks;
  }
  if (!quiet && output == OutputFormat::kJson) fmt::print("{}", json_text(outcome, path));
  if (!quiet && output == OutputFormat::kHuman) {
    if (outcome.repaired()) fmt::print("{}", repaired_text(outcome));
    fmt::print("{}", human_text(*outcome.result));
  }
  if (outcome.result->check_errors != 0) print_error("Check failed");
  return exit_status(*outcome.result);
}

}  // namespace

int run_image_check(const po::variables_map& values) {
  const OutputFormat output = output_format(values);
  const ImageName name = one_image(values);
  const NamedFile image = named_file(name);
  const std::optional<Repair> repair = repair_mode(values);
  const CacheMode cache = source_cache(values);
  const FileAccess access{.writable = repair.has_value(),
                          .locked = !is_set(values, "force-share"),
                          .direct = cache.direct};
  require_openable(image.path, name.text);
  if (repair && !access.locked) {
    throw Error(EINVAL, fmt::format("Could not open '{}': force-share=on can only be used with "
                                    "read-only images",
                                    name.text));
  }
  Outcome outcome;
  const auto work = [&](ImageGraph& graph) {
    outcome = graph.use_file(image.file, access,
                             [&](block::Edge& file) { return check(file, image, repair); });
  };
  try {
    if (repair) {
      ImageGraph graph;  // the sandbox is for those that only read
      graph.run([&] { work(graph); });
    } else {
      Sandbox sandbox(values, {name}, Sandbox::Backing::kNotNeeded);
      sandbox.run(work);
    }
  } catch (Error& e) {
    if (e.err() == EBUSY || personality().drop_in) refuse_open(e, image.path, name.text, false);
    throw;
  }
  return tell(outcome, name.text, output, is_set(values, "quiet"));
}

}  // namespace minivmm::cli
