// SPDX-License-Identifier: Apache-2.0
// minivmm image info
#include <stdlib.h>

#include <algorithm>
#include <cerrno>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/opening.h"
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
      "sfoiU");
}

namespace {

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&::free)> resolved(::realpath(path.c_str(), nullptr),
                                                          &::free);
  return resolved ? std::string(resolved.get()) : path;
}

std::string chain_text(const std::vector<ImageFacts>& chain) {
  std::string out;
  // Of an absurd chain its beginning says enough.
  for (size_t i = 0; i < std::min<size_t>(chain.size(), 16); ++i) {
    out += printable(chain[i].path) + " -> ";
  }
  return out;
}

// What went wrong with a backing file, which its message names.
struct BrokenChain : Error {
  using Error::Error;
  explicit BrokenChain(const Error& error) : Error(error) {}
};

// From the image downwards, as far as it goes. Images are not trusted: each link is opened only
// where the policy allows it.
std::vector<ImageFacts> inspect_chain(ImageGraph& graph, const NamedFile& image,
                                      FileAccess access) {
  std::vector<ImageFacts> chain{inspect_image(graph, image, access)};
  std::string path = image.path;
  Strings seen;
  for (;;) {
    seen.push_back(real_path(path));
    const ImageFacts& last = chain.back();
    if (!last.has_backing()) return chain;
    std::string format = last.qcow2->backing_format;
    if (!personality().drop_in) {
      block::Options link =
          block::backing_options(graph.policy(), path, last.qcow2->backing_file, format);
      format = link.take_string("driver").value_or("");
      // The file that was allowed and no other that has its name by now.
      access.inode = link.take_string("file.inode").value_or("");
    }
    path = last.full_backing_path();
    if (std::find(seen.begin(), seen.end(), real_path(path)) != seen.end()) {
      throw Error(ELOOP, fmt::format("Backing file '{0}' creates an infinite loop: {1}{0}",
                                     printable(path), chain_text(chain)));
    }
    if (chain.size() >= block::kMaxGraphDepth) {
      throw Error(ELOOP, fmt::format("the backing chain is longer than {} images: {}...",
                                     block::kMaxGraphDepth, chain_text(chain)));
    }
    try {
      require_openable(path, path);
      chain.push_back(inspect_image(graph, path, format, access));
    } catch (Error& e) {
      throw BrokenChain(e);
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
  const ImageName name = one_image(values);
  const bool whole_chain = is_set(values, "backing-chain");
  const NamedFile image = whole_chain ? named_path(name) : named_file(name);
  require_openable(image.path, name.text);
  Sandbox sandbox(values, {name},
                  whole_chain ? Sandbox::Backing::kAsked : Sandbox::Backing::kNotNeeded);
  std::vector<ImageFacts> chain;
  // What is being written to is looked at all the same, except as qemu-img.
  const FileAccess access{.locked = personality().drop_in && !is_set(values, "force-share")};
  try {
    sandbox.run([&](ImageGraph& graph) {
      if (whole_chain) {
        chain = inspect_chain(graph, image, access);
      } else {
        chain.push_back(inspect_image(graph, image, access));
      }
    });
  } catch (const BrokenChain&) {
    throw;
  } catch (Error& e) {
    if (e.err() == EBUSY || personality().drop_in) refuse_open(e, image.path, name.text, false);
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
