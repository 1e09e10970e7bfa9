// SPDX-License-Identifier: Apache-2.0
// minivmm image create
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <optional>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_create_file.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_create_syntax() {
  return image_syntax(
      "Usage: minivmm image create [-f FORMAT] [-b BACKING -F BACKING_FORMAT] [-o OPTIONS] FILE "
      "[SIZE]\n\n"
      "Makes a disk image. SIZE is in bytes or with a suffix (k, M, G, T, P, E, powers of 1024); "
      "an\n"
      "image with a backing file takes that one's size where none is given. What FILE held is "
      "lost;\n"
      "a file that is in use is refused.\n\n"
      "Examples:\n"
      "  minivmm image create -f qcow2 disk.qcow2 20G\n"
      "  minivmm image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2\n"
      "  minivmm image create -f qcow2 -o cluster_size=128k,lazy_refcounts=on disk.qcow2 20G\n"
      "  minivmm image create -f raw -o preallocation=falloc disk.img 20G\n"
      "  minivmm image create -f qcow2 -o help          # every option\n\n",
      {
          {"format,f", "FORMAT", "qcow2 or raw (the default)"},
          {"backing,b", "FILE",
           "the backing file, as it is recorded: relative to the new image's directory"},
          {"backing-format,F", "FORMAT", "the backing file's format; -b needs it"},
          {"unsafe,u", nullptr, "record the backing file without looking at it"},
          {"options,o", "NAME=VALUE,...", "options of the format; `-o help` lists them"},
      },
      "q");
}

namespace {

std::string format_of(const po::variables_map& values) {
  return optional_text(values, "format").value_or("raw");
}

NewImage read_request(const po::variables_map& values, const Strings& names) {
  NewImage out;
  out.file_name = names[0];
  out.format = format_of(values);
  out.look_at_backing = !is_set(values, "unsafe");
  // Before anything else, as qemu-img: a wrong size is not blamed on the file.
  const bool sized = names.size() > 1;
  const uint64_t size = sized ? parse_size_as(names[1], "image size") : 0;
  try {
    out.options = CreateOptionList(out.format);
    for (const std::string& text : text_values(values, "options")) out.options.parse(text);
    if (sized) {
      if (out.options.has("size")) {
        throw Error(EINVAL, "The image size must be specified only once");
      }
      out.options.set("size", fmt::format("{}", size));
    }
    set_backing(out, optional_text(values, "backing"), optional_text(values, "backing-format"));
  } catch (Error& e) {
    e.prepend(out.file_name);
    throw;
  }
  out.path = host_path(out.file_name);
  return out;
}

void create(ImageGraph& graph, NewImage& image, bool quiet) {
  complete_image(graph, image);
  if (!quiet) {
    fmt::print("Formatting '{}', fmt={} {}\n", image.file_name, image.format,
               image.options.formatted());
    std::fflush(stdout);
  }
  make_image(graph, image);
}

}  // namespace

int run_image_create(const po::variables_map& values) {
  if (print_create_options(values, format_of(values))) return 0;
  const Strings names = given_names(values);
  if (names.empty()) throw UsageError{"Expecting image file name"};
  if (names.size() > 2) throw UsageError{fmt::format("Unexpected argument: {}", names[2])};
  NewImage image = read_request(values, names);
  ImageGraph graph;
  try {
    graph.run([&] { create(graph, image, is_set(values, "quiet")); });
  } catch (Error& e) {
    e.prepend(image.file_name);
    throw;
  }
  return 0;
}

}  // namespace minivmm::cli
