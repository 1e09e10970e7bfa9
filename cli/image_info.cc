// SPDX-License-Identifier: Apache-2.0
// minivmm image info
#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_facts.h"
#include "cli/image_info_output.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_info_syntax() {
  return image_syntax(
      "Usage: minivmm image info [-f FORMAT] [--output=human|json] [--backing-chain] FILE\n\n"
      "Shows what an image file says of itself: format, sizes, backing file, features. Works on "
      "an\n"
      "image that is in use. No file that the image names is opened, except for --backing-chain, "
      "and\n"
      "then only images in the image's own directory or a --backing-root.\n\n"
      "Examples:\n"
      "  minivmm image info disk.qcow2\n"
      "  minivmm image info --backing-chain overlay.qcow2\n"
      "  minivmm image info --output=json disk.qcow2 | jq '.\"virtual-size\"'\n\n",
      {
          {"backing-chain", nullptr, "the backing files as well, from the image downwards"},
      },
      "sfoU");
}

namespace {

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&::free)> resolved(::realpath(path.c_str(), nullptr),
                                                          &::free);
  return resolved ? std::string(resolved.get()) : path;
}

std::string chain_text(const std::vector<ImageFacts>& chain) {
  std::string out;
  for (const ImageFacts& link : chain) out += printable(link.path) + " -> ";
  return out;
}

// From the image downwards, as far as it goes. Images are not trusted: each link is opened only
// where the policy allows it.
std::vector<ImageFacts> inspect_chain(ImageGraph& graph, std::string path, std::string format,
                                      FileAccess access) {
  std::vector<ImageFacts> chain;
  Strings seen;
  for (;;) {
    chain.push_back(inspect_image_on_fiber(graph, path, format, access));
    seen.push_back(real_path(path));
    const ImageFacts& last = chain.back();
    if (!last.has_backing()) return chain;
    if (personality().drop_in) {
      format = last.qcow2->backing_format;
    } else {
      block::Options link = block::backing_options(graph.policy(), path, last.qcow2->backing_file,
                                                   last.qcow2->backing_format);
      format = link.take_string("driver").value_or("");
    }
    path = last.full_backing_path();
    if (std::find(seen.begin(), seen.end(), real_path(path)) != seen.end()) {
      throw Error(ELOOP, fmt::format("Backing file '{0}' creates an infinite loop: {1}{0}",
                                     printable(path), chain_text(chain)));
    }
    if (chain.size() >= block::kMaxGraphDepth) {
      throw Error(ELOOP, fmt::format("{}: the backing chain is longer than {} images",
                                     chain.front().path, block::kMaxGraphDepth));
    }
  }
}

std::string human_text(const std::vector<ImageFacts>& chain) {
  std::string out;
  for (const ImageFacts& facts : chain) {
    if (!out.empty()) out += "\n";
    out += info_text(facts);
  }
  return out;
}

}  // namespace

int run_image_info(const po::variables_map& values) {
  const OutputFormat output = output_format(values);
  const std::string path = host_path(one_file_name(values));
  const std::string format = text_value(values, "format");
  const bool whole_chain = is_set(values, "backing-chain");
  const std::string name = one_file_name(values);
  require_openable(path, name);
  Sandbox sandbox(values, {ImageName{name, format}},
                  whole_chain ? Sandbox::Backing::kAsked : Sandbox::Backing::kNotNeeded);
  std::vector<ImageFacts> chain;
  // What is being written to is looked at all the same, except as qemu-img.
  const FileAccess access{.locked = personality().drop_in && !is_set(values, "force-share")};
  try {
    sandbox.run([&](ImageGraph& graph) {
      if (whole_chain) {
        chain = inspect_chain(graph, path, format, access);
      } else {
        chain.push_back(inspect_image_on_fiber(graph, path, format, access));
      }
    });
  } catch (Error& e) {
    if (e.err() == EBUSY) refuse_open(e, path, name, false);
    throw;
  }
  if (output == OutputFormat::kHuman) {
    fmt::print("{}", human_text(chain));
  } else {
    fmt::print("{}", whole_chain ? info_json(chain) : info_json(chain.front()));
  }
  return 0;
}

}  // namespace minivmm::cli
