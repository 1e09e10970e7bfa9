// SPDX-License-Identifier: Apache-2.0
#include "cli/image_convert_options.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

namespace {

constexpr unsigned kMostRequests = 16;
constexpr uint64_t kMostSparse = 16 << 20;

uint64_t read_sparse(const po::variables_map& values) {
  const auto size = size_value(values, "sparse", "buffer size for sparse output");
  if (!size) return 4096;
  if (*size % 512 != 0 || *size > kMostSparse) {
    throw Error(EINVAL,
                fmt::format("Invalid buffer size for sparse output specified. Valid sizes are "
                            "multiples of 512 up to {}. Select 0 to disable sparse detection "
                            "(fully allocates output).",
                            kMostSparse));
  }
  return *size;
}

unsigned read_requests(const po::variables_map& values) {
  if (values.count("parallel") == 0) return 0;
  const std::string text = text_value(values, "parallel");
  const bool digits =
      !text.empty() && text.size() < 4 && text.find_first_not_of("0123456789") == std::string::npos;
  const unsigned long number = digits ? std::stoul(text) : 0;
  if (number >= 1 && number <= kMostRequests) return static_cast<unsigned>(number);
  throw Error(EINVAL, fmt::format("Invalid number of coroutines. Allowed number of coroutines is "
                                  "between 1 and {}",
                                  kMostRequests));
}

// Options that exclude or need each other, in qemu-img's order.
void check_together(const po::variables_map& values, const ConvertRequest& request) {
  if (request.backing && request.target_format != "qcow2") {
    throw Error(EINVAL, fmt::format("Backing file not supported for file format '{}'",
                                    request.target_format));
  }
  const bool names_backing = request.backing || sets_option(request, "backing_file=");
  if (names_backing && !request.backing_format && !sets_option(request, "backing_fmt=")) {
    throw Error(EINVAL, "Use of backing file requires explicit backing format");
  }
  if (request.target_is_options && !request.skip_create) {
    throw Error(EINVAL, "--target-image-opts requires use of -n flag");
  }
  if (request.skip_create && !request.create_options.empty()) {
    throw Error(EINVAL, "-o has no effect when skipping image creation");
  }
  if (request.copy_range && values.count("sparse") != 0) {
    throw Error(EINVAL, "Cannot enable copy offloading when -S is used");
  }
  if (request.copy_range && request.compress) {
    throw Error(EINVAL, "Cannot enable copy offloading when -c is used");
  }
  if (request.salvage && request.copy_range) {
    throw Error(EINVAL, "Cannot use copy offloading in salvaging mode");
  }
  if (request.target_is_options && values.count("output-format") != 0) {
    throw Error(EINVAL, "--image-opts and --format are mutually exclusive");
  }
  if (request.target_is_zero && !request.skip_create) {
    throw Error(EINVAL, "--target-is-zero requires use of -n flag");
  }
}

}  // namespace

ImageSyntax image_convert_syntax() {
  return image_syntax(
      "Usage: minivmm image convert [options] FILE [FILE2 ...] OUTPUT_FILE\n\n"
      "Copies an image, or several one after the other, into a new one. Holes and zeroes take no\n"
      "room in it. Many requests run at once, on every core. If it is stopped or fails, a file "
      "that\n"
      "was made is removed, and one that was there is named as incomplete.\n\n"
      "Examples:\n"
      "  minivmm image convert -O qcow2 disk.img disk.qcow2\n"
      "  minivmm image convert -p -f qcow2 -O raw disk.qcow2 disk.img\n"
      "  minivmm image convert -O qcow2 -o cluster_size=128k disk.img disk.qcow2\n"
      "  minivmm image convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2\n"
      "  minivmm image convert -n -O raw disk.qcow2 /dev/vg/disk\n\n",
      {
          {"output-format,O", "FORMAT", "the new image's format: qcow2, luks or raw (the default)"},
          {"options,o", "NAME=VALUE,...", "options of the new image, as of `image create`"},
          {"backing,B", "FILE",
           "the new image's backing file: what it holds already is not copied"},
          {"backing-format,F", "FORMAT", "the backing file's format; -B needs it"},
          {"skip-create,n", nullptr, "the output is there already: write into it"},
          {"target-is-zero", nullptr, "the output, which is there, reads as zeroes (with -n)"},
          {"target-image-opts", nullptr, "the output is named by options (with -n)"},
          {"compress,c", nullptr, "store data compressed, where the format can"},
          {"sparse,S", "SIZE",
           "how many zeroes make a hole (default 4k); 0: none, everything is written"},
          {"snapshot,l", "SNAPSHOT",
           "read a snapshot and not the disk: its number or name, or "
           "snapshot.id=ID,snapshot.name=NAME"},
          {"bitmaps", nullptr, "copy the dirty bitmaps as well"},
          {"skip-broken-bitmaps", nullptr, "but for those that are inconsistent"},
          {"salvage", nullptr, "go on where the source cannot be read, with zeroes"},
          {"copy-range,C", nullptr,
           "let the file system copy; done without being asked where it can share the data"},
          {"parallel,m", "N", "requests in flight, 1 to 16 (default: 2 a core)"},
          {"out-of-order,W", nullptr, "allowed without being asked: accepted for qemu-img's sake"},
          {"rate,r", "BYTES", "bytes of data a second, at most"},
      },
      "ftTipqU");
}

bool sets_option(const ConvertRequest& request, std::string_view beginning) {
  return std::any_of(request.create_options.begin(), request.create_options.end(),
                     [&](const std::string& text) {
                       return ("," + text).find(fmt::format(",{}", beginning)) != std::string::npos;
                     });
}

ConvertRequest read_convert_request(const po::variables_map& values) {
  ConvertRequest out;
  out.zero_bytes = read_sparse(values);
  out.requests = read_requests(values);
  out.rate = size_value(values, "rate", "rate limit").value_or(0);
  out.target_format = optional_text(values, "output-format").value_or("raw");
  out.create_options = text_values(values, "options");
  out.backing = optional_text(values, "backing");
  out.backing_format = optional_text(values, "backing-format");
  out.skip_create = is_set(values, "skip-create");
  out.target_is_options = is_set(values, "target-image-opts");
  out.target_is_zero = is_set(values, "target-is-zero");
  out.compress = is_set(values, "compress");
  out.copy_range = is_set(values, "copy-range");
  out.salvage = is_set(values, "salvage");
  out.force_share = is_set(values, "force-share");
  out.progress = is_set(values, "progress");
  out.quiet = is_set(values, "quiet");
  check_together(values, out);
  out.source_cache = source_cache(values);
  out.target_cache = target_cache(values, "unsafe");
  out.bitmaps = is_set(values, "bitmaps");
  out.skip_broken_bitmaps = is_set(values, "skip-broken-bitmaps");
  if (out.skip_broken_bitmaps && !out.bitmaps) {
    throw Error(EINVAL, "Use of --skip-broken-bitmaps requires --bitmaps");
  }
  if (values.count("snapshot") != 0)
    out.snapshot = snapshot_options(text_value(values, "snapshot"));
  const Strings names = given_names(values);
  if (names.size() < 2) throw Error(EINVAL, "Must specify image file name");
  out.target = names.back();
  for (size_t i = 0; i + 1 < names.size(); ++i) {
    out.sources.push_back(named_image(values, names[i]));
  }
  return out;
}

}  // namespace minivmm::cli
