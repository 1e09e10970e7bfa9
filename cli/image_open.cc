// SPDX-License-Identifier: Apache-2.0
#include "cli/image_open.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/log.h"
#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "block/graph/open_policy.h"
#include "cli/image_arguments.h"
#include "cli/image_facts.h"
#include "cli/image_lock_holders.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using block::Options;
using block::Permissions;

CacheMode parse_cache_mode(const std::string& text, std::string_view what,
                           std::string_view otherwise) {
  const std::string_view mode = text.empty() ? otherwise : std::string_view(text);
  if (mode == "none" || mode == "off") return {.direct = true};
  if (mode == "writeback") return {};
  if (mode == "writethrough") return {.write_through = true};
  if (mode == "directsync") return {.direct = true, .write_through = true};
  if (mode == "unsafe") return {.no_flush = true};
  throw Error(EINVAL, fmt::format("Invalid {} option: {}", what, text));
}

CacheMode target_cache(const po::variables_map& values, std::string_view otherwise) {
  return parse_cache_mode(text_value(values, "cache"), "cache", otherwise);
}

CacheMode source_cache(const po::variables_map& values) {
  return parse_cache_mode(text_value(values, "source-cache"), "source cache", "writeback");
}

ImageName named_image(const po::variables_map& values, std::string text) {
  return {std::move(text), text_value(values, "format"), is_set(values, "image-opts")};
}

ImageName one_image(const po::variables_map& values) {
  return named_image(values, one_file_name(values));
}

bool same_file(const std::string& a, const std::string& b) {
  struct stat first {};
  struct stat second {};
  if (a == b) return true;
  return ::stat(a.c_str(), &first) == 0 && ::stat(b.c_str(), &second) == 0 &&
         first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

namespace {

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&::free)> resolved(::realpath(path.c_str(), nullptr),
                                                          &::free);
  return resolved ? std::string(resolved.get()) : path;
}

// What the kernel says of opening the file, in qemu-img's words.
void try_to_open(const std::string& path, bool writable) {
  if (base::is_nbd_uri(path)) return;  // its own error says it better
  const int flags = (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
  const base::UniqueFd fd(::open(path.c_str(), flags));
  if (!fd) throw base::errno_error(errno, fmt::format("Could not open '{}'", path));
}

// The locks of somebody else: as qemu-img says it, or who that is.
[[noreturn]] void refuse_locked(const std::string& path, bool writable, const Error& error) {
  if (personality().drop_in) {
    throw Error(EBUSY, fmt::format("Failed to get {}\"write\" lock\nIs another process using the "
                                   "image [{}]?",
                                   writable ? "" : "shared ", path));
  }
  const std::string text = error.what();
  // Or it is this very command that has it open, in another part.
  if (text.find("another process") == std::string::npos) throw Error(EBUSY, text);
  throw Error(EBUSY, fmt::format("{}\n{}", text, lock_holders_text(path)));
}

std::string chain_text(const std::vector<ChainLink>& chain) {
  std::string out;
  // Of an absurd chain its beginning says enough.
  for (size_t i = 0; i < std::min<size_t>(chain.size(), 16); ++i) {
    out += printable(chain[i].path) + " -> ";
  }
  return out;
}

ChainLink look_at(ImageGraph& graph, const std::string& path, const std::string& format,
                  bool writable) {
  if (personality().drop_in) try_to_open(path, writable);
  const ImageFacts facts = inspect_image_on_fiber(graph, path, format, {.locked = false});
  ChainLink out{path, facts.format, facts.virtual_size};
  if (facts.qcow2 && !facts.qcow2->data_file.empty()) {
    out.data_file = path_from_image(path, facts.qcow2->data_file);
  }
  if (facts.has_backing()) {
    out.recorded_name = facts.qcow2->backing_file;
    out.recorded_format = facts.qcow2->backing_format;
  }
  return out;
}

// Where the backing file of `link` is, and its format ("" to be guessed).
std::pair<std::string, std::string> follow(ImageGraph& graph, const ChainLink& link, bool trusted) {
  if (trusted || personality().drop_in) {
    return {host_path(path_from_image(link.path, link.recorded_name)), link.recorded_format};
  }
  Options found =
      block::backing_options(graph.policy(), link.path, link.recorded_name, link.recorded_format);
  return {path_from_image(link.path, link.recorded_name), found.take_string("driver").value_or("")};
}

}  // namespace

void require_openable(const std::string& path, const std::string& name) {
  if (!personality().drop_in) return;
  try {
    try_to_open(path, false);
  } catch (Error& e) {
    e.prepend(fmt::format("Could not open '{}'", name));
    throw;
  }
}

std::vector<ChainLink> find_chain(ImageGraph& graph, const std::string& path,
                                  const std::string& format, const OpenMode& mode) {
  std::vector<ChainLink> chain{look_at(graph, path, format, mode.writable)};
  std::vector<std::string> seen{real_path(path)};
  while (mode.with_backing && !chain.back().recorded_name.empty()) {
    try {
      const auto [next, next_format] = follow(graph, chain.back(), mode.trusted);
      if (std::find(seen.begin(), seen.end(), real_path(next)) != seen.end()) {
        throw Error(ELOOP, fmt::format("Backing file '{0}' creates an infinite loop: {1}{0}",
                                       printable(next), chain_text(chain)));
      }
      if (chain.size() >= block::kMaxGraphDepth) {
        throw Error(ELOOP, fmt::format("the backing chain is longer than {} images: {}...",
                                       block::kMaxGraphDepth, chain_text(chain)));
      }
      seen.push_back(real_path(next));
      chain.push_back(look_at(graph, next, next_format, false));
    } catch (Error& e) {
      e.prepend("Could not open backing file");
      throw;
    }
  }
  return chain;
}

Options layer_options(const std::string& path, const std::string& format, const OpenMode& mode) {
  Options out;
  out.set("driver", format);
  out.set("read-only", mode.writable ? "off" : "on");
  out.set("cache.writeback", mode.cache.write_through ? "off" : "on");
  if (!set_protocol(out, "file.", path)) return out;
  out.set("file.locking", mode.force_share ? "off" : "auto");
  out.set("file.cache.direct", mode.cache.direct ? "on" : "off");
  out.set("file.cache.no-flush", mode.cache.no_flush ? "on" : "off");
  return out;
}

namespace {

// The chain as one tree of options, from its last image upwards.
Options chain_options(const std::vector<ChainLink>& chain, const OpenMode& mode, bool guessed) {
  std::optional<Options> below;
  for (size_t i = chain.size(); i-- > 0;) {
    OpenMode layer = mode;
    if (i != 0) layer.writable = false;
    Options options = layer_options(chain[i].path, chain[i].format, layer);
    if (chain[i].format == "qcow2") {
      // Otherwise the driver follows the recorded name, by the graph's policy.
      if (!chain[i].data_file.empty() && (mode.trusted || personality().drop_in)) {
        options.set_child("data-file", layer_options(host_path(chain[i].data_file), "raw", layer));
      }
      if (below) {
        options.set_child("backing", std::move(*below));
      } else {
        options.set_null("backing");
      }
    } else if (i == 0 && guessed && mode.writable) {
      options.set("probed", "on");
    }
    if (i == 0) {
      for (const auto& [key, value] : mode.options) options.set(key, value);
    }
    below = std::move(options);
  }
  return std::move(*below);
}

// The file behind an image that is named by options, for what is to be found in it.
std::string path_of(const Options& options) {
  for (const char* key : {"file.filename", "filename"}) {
    Options copy = options;
    if (const auto path = copy.take_string(key)) return *path;
  }
  return {};
}

// An image as it is to be opened.
struct Description {
  Options options;
  std::string path;  // of its file; empty where that is not known
  std::string format;
  bool guessed = false;
};

Description describe_path(ImageGraph& graph, const ImageName& name, const OpenMode& mode) {
  Description out;
  out.path = host_path(name.text);
  const std::vector<ChainLink> chain = find_chain(graph, out.path, name.format, mode);
  out.format = chain.front().format;
  out.guessed = name.format.empty();
  out.options = chain_options(chain, mode, out.guessed);
  return out;
}

// What --image-opts leaves to be filled in.
Description describe_options(ImageGraph& graph, const ImageName& name, const OpenMode& mode) {
  Description out;
  out.options = Options::from_text(name.text);
  out.path = path_of(out.options);
  if (!out.options.has("driver")) {
    // As qemu-img: then it is guessed from the file.
    out.guessed = true;
    out.options.set("driver", look_at(graph, out.path, {}, mode.writable).format);
  }
  out.format = out.options.peek("driver").value_or("");
  Options& options = out.options;
  for (const auto& [key, value] : mode.options) options.set(key, value);
  if (!options.has("read-only")) options.set("read-only", mode.writable ? "off" : "on");
  if (!mode.with_backing && out.format == "qcow2" && !options.has("backing")) {
    options.set_null("backing");
  }
  // A format with a file name of its own: the name is that of its file.
  const bool is_file = out.format == "file" || out.format == "host_device";
  if (options.has("filename") && !is_file) {
    options.set("file.filename", *options.take_string("filename"));
  }
  Options copy = options;
  const auto file = copy.take_child("file");
  if (!file || !file->options) return out;
  if (!file->options->has("driver")) options.set("file.driver", "file");
  if (mode.force_share && !file->options->has("locking")) options.set("file.locking", "off");
  return out;
}

}  // namespace

void refuse_open(Error& error, const std::string& path, const std::string& name, bool writable) {
  const std::string where = fmt::format("Could not open '{}'", name);
  try {
    if (error.err() == EBUSY) refuse_locked(path.empty() ? name : path, writable, error);
  } catch (Error& told) {
    told.prepend(where);
    throw;
  }
  error.prepend(where);
  throw error;
}

OpenImage::OpenImage(ImageGraph& graph, const ImageName& name, const OpenMode& mode)
    : graph_(graph.graph()), name_(name.text) {
  Description found;
  try {
    found =
        name.is_options ? describe_options(graph, name, mode) : describe_path(graph, name, mode);
    format_ = found.format;
    guessed_ = found.guessed;
    const std::shared_ptr<block::Node> node = graph_.add(std::move(found.options));
    node_name_ = node->name();
    const uint8_t uses = mode.writable ? Permissions::kWrite | Permissions::kResize : 0;
    edge_ = std::make_unique<block::Edge>(
        node, "the image command",
        Permissions{.uses = uses, .shares = Permissions::kWrite | Permissions::kResize});
  } catch (Error& e) {
    refuse_open(e, found.path, name_, mode.writable);
  }
}

void warn_of_guess(const OpenImage& image) {
  if (!image.guessed() || image.format() != "raw") return;
  std::fflush(stdout);
  fmt::print(stderr,
             "WARNING: Image format was not specified for '{}' and probing guessed raw.\n"
             "         Automatically detecting the format is dangerous for raw images, write "
             "operations on block 0 will be restricted.\n"
             "         Specify the 'raw' format explicitly to remove the restrictions.\n",
             image.name());
}

OpenImage::~OpenImage() {
  try {
    close();
  } catch (const std::exception& e) {
    // Only while another error is on its way, which says more.
    base::log_error("{}", e.what());
  }
}

uint64_t OpenImage::size() const noexcept { return base::align_up<uint64_t>(edge_->size(), 512); }

void OpenImage::close() {
  edge_.reset();
  if (const std::string name = std::exchange(node_name_, {}); !name.empty()) graph_.remove(name);
}

}  // namespace minivmm::cli
