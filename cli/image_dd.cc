// SPDX-License-Identifier: Apache-2.0
// minivmm image dd
#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <optional>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/jobs/copy_job.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_facts.h"
#include "cli/image_loops.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"
#include "cli/image_target.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_dd_syntax() {
  return image_syntax(
      "Usage: minivmm image dd [-f FORMAT] [-O FORMAT] [bs=SIZE] [count=N] [skip=N] if=FILE "
      "of=FILE\n"
      "\n"
      "Copies N blocks of an image, from the block after `skip`, into a new image of that size.\n\n"
      "Examples:\n"
      "  minivmm image dd -O qcow2 if=disk.img of=disk.qcow2\n"
      "  minivmm image dd bs=512 count=1 if=disk.qcow2 of=first-sector.bin\n\n",
      {
          {"output-format,O", "FORMAT", "the new image's format: qcow2 or raw (the default)"},
      },
      "fiU");
}

namespace {

struct DdRequest {
  ImageName input;
  std::string output;
  std::string format;
  bool force_share = false;
  uint64_t block = 512;
  std::optional<uint64_t> count;
  uint64_t skip = 0;
};

void read_operand(DdRequest& out, std::string& input, const std::string& text) {
  const size_t equals = text.find('=');
  const std::string name = text.substr(0, equals);
  const std::string value = equals == std::string::npos ? "" : text.substr(equals + 1);
  if (equals == std::string::npos ||
      (name != "if" && name != "of" && name != "bs" && name != "count" && name != "skip")) {
    throw Error(EINVAL, fmt::format("unrecognized operand {}", name));
  }
  if (name == "if") input = value;
  if (name == "of") out.output = value;
  if (name == "count") out.count = parse_size_as(value, "count");
  if (name == "skip") out.skip = parse_size_as(value, "skip");
  if (name != "bs") return;
  out.block = parse_size_as(value, "bs");
  if (out.block == 0 || out.block > INT_MAX) {
    throw Error(EINVAL, fmt::format("Invalid bs specified. Must be between 1 and {}.", INT_MAX));
  }
}

DdRequest read_request(const po::variables_map& values) {
  DdRequest out;
  out.format = values.count("output-format") != 0 ? text_value(values, "output-format") : "raw";
  if (personality().drop_in && !is_format(out.format)) {
    throw Error(EINVAL, "Unknown file format");
  }
  out.force_share = is_set(values, "force-share");
  std::string input;
  for (const std::string& operand : given_names(values)) read_operand(out, input, operand);
  if (input.empty() || out.output.empty()) {
    throw Error(EINVAL, "Must specify both input and output files");
  }
  out.input = named_image(values, input);
  return out;
}

// A part of a disk as a source of its own.
class PartSource final : public block::CopySource {
 public:
  PartSource(block::CopySource& whole, uint64_t offset, uint64_t length) noexcept
      : whole_(whole), offset_(offset), length_(length) {}
  uint64_t size() const noexcept override { return length_; }
  void read(uint64_t offset, block::IoSpan to) override { whole_.read(offset_ + offset, to); }
  block::SourceExtent extent(uint64_t offset, uint64_t length) override {
    block::SourceExtent found = whole_.extent(offset_ + offset, length);
    found.offset = offset;
    return found;
  }
  void copy_to(block::Edge& target, uint64_t target_offset, uint64_t offset,
               uint64_t length) override {
    whole_.copy_to(target, target_offset, offset_ + offset, length);
  }

 private:
  block::CopySource& whole_;
  const uint64_t offset_;
  const uint64_t length_;
};

uint64_t times(uint64_t blocks, uint64_t block) {
  return base::checked_mul(blocks, block).value_or(UINT64_MAX);
}

// Fiber.
void copy(ImageGraph& graph, const DdRequest& request) {
  OpenImage input(graph, request.input, {.force_share = request.force_share});
  const uint64_t size = input.size();
  const uint64_t most = request.count ? times(*request.count, request.block) : size;
  const uint64_t skip = times(request.skip, request.block);
  const uint64_t length = skip >= size ? 0 : std::min(size - skip, most);
  if (skip > size) {
    print_error(fmt::format("{}: cannot skip to specified offset", request.input.text));
  }
  NewImage image;
  image.file_name = request.output;
  image.path = host_path(request.output);
  image.format = request.format;
  image.purpose = "creating output image";
  image.options = CreateOptionList(request.format);
  image.options.set("size", fmt::format("{}", length));
  TargetImage target(graph, image, {});
  block::DiskSource disk(input.edge(), size);
  PartSource part(disk, skip, length);
  block::CopyJob job(part, request.input.text, target.edge(), request.output,
                     {.target_is_zero = target.is_zero()});
  ProgressMeter meter(
      ProgressMeter::Style::kNone,
      [&] {
        return ProgressState{job.done(), length, job.data_done()};
      },
      [&] { job.cancel(); });
  job.run(graph.loops());
  target.finish();
  meter.finish();
}

}  // namespace

int run_image_dd(const po::variables_map& values) {
  const DdRequest request = read_request(values);
  ImageGraph graph({}, job_loops());
  graph.run([&] { copy(graph, request); });
  return 0;
}

}  // namespace minivmm::cli
