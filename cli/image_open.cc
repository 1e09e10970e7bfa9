// SPDX-License-Identifier: Apache-2.0
#include "cli/image_open.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <span>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/log.h"
#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "block/graph/open_policy.h"
#include "block/graph/opening.h"
#include "cli/image_arguments.h"
#include "cli/image_facts.h"
#include "cli/image_lock_holders.h"
#include "cli/image_named_file.h"
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

NodeOptions snapshot_options(const std::string& text) {
  if (!text.starts_with("snapshot.")) return {{"snapshot", text}};
  const std::string wrong = fmt::format("Failed in parsing snapshot param '{}'", text);
  Options parsed = Options::from_text(text);
  NodeOptions out;
  for (const char* key : {"id", "name"}) {
    const std::string option = std::string("snapshot.") + key;
    if (const auto value = parsed.take_string(option)) {
      out.emplace_back(std::string("snapshot-") + key, *value);
    }
  }
  const auto child = parsed.take_child("snapshot");
  if (child && child->options && !child->options->empty()) {
    const std::string key = "snapshot." + child->options->keys().front();
    throw Error(EINVAL, two_messages(fmt::format("Invalid parameter '{}'", key), wrong));
  }
  if (out.empty()) throw Error(EINVAL, wrong);
  return out;
}

ImageName named_image(const po::variables_map& values, std::string text,
                      const char* format_option) {
  // As QEMU: a path may be the options themselves.
  constexpr std::string_view kJson = "json:";
  if (!is_set(values, "image-opts") && text.starts_with(kJson)) {
    return {text.substr(kJson.size()), text_value(values, format_option), true};
  }
  std::string format = text_value(values, format_option);
  const bool is_options = is_set(values, "image-opts");
  if (is_options && !format.empty()) {
    throw Error(EINVAL, "--image-opts and --format are mutually exclusive");
  }
  return {std::move(text), std::move(format), is_options};
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
  // The commands that write have no such option.
  const char* const way_out = writable ? "" : "; -U reads it all the same";
  throw Error(EBUSY, fmt::format("{}\n{}{}", text, lock_holders_text(path), way_out));
}

std::string chain_text(const std::vector<ChainLink>& chain) {
  std::string out;
  // Of an absurd chain its beginning says enough.
  for (size_t i = 0; i < std::min<size_t>(chain.size(), 16); ++i) {
    out += printable(chain[i].path) + " -> ";
  }
  return out;
}

ChainLink look_at(ImageGraph& graph, const FileToOpen& file, const OpenMode& mode, bool writable) {
  if (personality().drop_in) try_to_open(file.path, writable);
  const ImageFacts facts =
      inspect_image(graph, file.path, file.format,
                    {.locked = false, .direct = mode.cache.direct, .inode = file.inode});
  ChainLink out{file.path, facts.format, facts.virtual_size};
  out.inode = file.inode;
  if (facts.qcow2 && !facts.qcow2->data_file.empty()) {
    out.data_file = path_from_image(file.path, facts.qcow2->data_file);
  }
  if (facts.has_backing()) {
    out.recorded_name = facts.qcow2->backing_file;
    out.recorded_format = facts.qcow2->backing_format;
  }
  return out;
}

// Where the backing file of `link` is.
FileToOpen follow(ImageGraph& graph, const ChainLink& link, bool trusted) {
  if (trusted || personality().drop_in) {
    return {host_path(path_from_image(link.path, link.recorded_name)), link.recorded_format};
  }
  Options found =
      block::backing_options(graph.policy(), link.path, link.recorded_name, link.recorded_format);
  // The name was allowed for the file that has it now. Another one that takes it is not opened.
  return {path_from_image(link.path, link.recorded_name), found.take_string("driver").value_or(""),
          found.take_string("file.inode").value_or("")};
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

void find_chain(ImageGraph& graph, const FileToOpen& file, const OpenMode& mode,
                std::vector<ChainLink>& chain) {
  chain.push_back(look_at(graph, file, mode, mode.writable));
  std::vector<std::string> seen{real_path(file.path)};
  while (mode.with_backing && !chain.back().recorded_name.empty()) {
    try {
      const FileToOpen next = follow(graph, chain.back(), mode.trusted);
      if (std::find(seen.begin(), seen.end(), real_path(next.path)) != seen.end()) {
        throw Error(ELOOP, fmt::format("Backing file '{0}' creates an infinite loop: {1}{0}",
                                       printable(next.path), chain_text(chain)));
      }
      if (chain.size() >= block::kMaxGraphDepth) {
        throw Error(ELOOP, fmt::format("the backing chain is longer than {} images: {}...",
                                       block::kMaxGraphDepth, chain_text(chain)));
      }
      seen.push_back(real_path(next.path));
      chain.push_back(look_at(graph, next, mode, false));
    } catch (Error& e) {
      e.prepend("Could not open backing file");
      throw;
    }
  }
}

std::vector<ChainLink> find_chain(ImageGraph& graph, const FileToOpen& file, const OpenMode& mode) {
  std::vector<ChainLink> chain;
  find_chain(graph, file, mode, chain);
  return chain;
}

Options layer_options(const std::string& path, const std::string& format, const OpenMode& mode,
                      const std::string& inode) {
  Options out;
  out.set("driver", format);
  out.set("read-only", mode.writable ? "off" : "on");
  out.set("cache.writeback", mode.cache.write_through ? "off" : "on");
  if (!set_protocol(out, "file.", path)) return out;
  out.set("file.locking", mode.force_share ? "off" : "auto");
  out.set("file.cache.direct", mode.cache.direct ? "on" : "off");
  out.set("file.cache.no-flush", mode.cache.no_flush ? "on" : "off");
  if (!inode.empty()) out.set("file.inode", inode);
  return out;
}

namespace {

void set_options(Options& options, const OpenMode& mode) {
  for (const NodeOptions* list : {&mode.options, &mode.snapshot}) {
    for (const auto& [key, value] : *list) options.set(key, value);
  }
}

bool may_open(const ChainLink& link, const OpenMode& mode) {
  return !link.data_file.empty() && (mode.trusted || personality().drop_in);
}

// The chain as one tree of options, from its last image upwards.
Options chain_options(std::span<const ChainLink> chain, const OpenMode& mode, bool guessed) {
  std::optional<Options> below;
  for (size_t i = chain.size(); i-- > 0;) {
    OpenMode layer = mode;
    if (i != 0) layer.writable = false;
    Options options = layer_options(chain[i].path, chain[i].format, layer, chain[i].inode);
    if (chain[i].format == "qcow2") {
      // Otherwise the driver follows the recorded name, by the graph's policy.
      if (may_open(chain[i], mode)) {
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
    if (i == 0) set_options(options, mode);
    below = std::move(options);
  }
  return std::move(*below);
}

// An image as it is to be opened.
struct Description {
  Options options;
  std::string path;  // of its file; empty where that is not known
  std::string format;
  bool guessed = false;
};

void describe_path(ImageGraph& graph, const ImageName& name, const OpenMode& mode,
                   Description& out) {
  out.path = host_path(name.text);
  const std::vector<ChainLink> chain = find_chain(graph, {out.path, name.format, name.inode}, mode);
  out.format = chain.front().format;
  out.guessed = name.format.empty();
  out.options = chain_options(chain, mode, out.guessed);
}

// What a qcow2 image names is opened as it is where the image is named by its path.
void add_references(ImageGraph& graph, const std::string& path, const OpenMode& mode,
                    Options& options) {
  OpenMode below = mode;
  below.writable = false;
  below.options.clear();
  below.snapshot.clear();
  const std::vector<ChainLink> chain = find_chain(graph, {path, "qcow2"}, below);
  if (chain.size() > 1) {
    options.set_child("backing", chain_options(std::span(chain).subspan(1), below, false));
  }
  if (may_open(chain[0], mode) && !options.has("data-file")) {
    options.set_child("data-file", layer_options(host_path(chain[0].data_file), "raw", mode));
  }
}

// What --image-opts leaves to be filled in.
void describe_options(ImageGraph& graph, const ImageName& name, const OpenMode& mode,
                      Description& out) {
  NamedFile named = named_file(name);
  out.path = named.path;
  out.format = named.format;
  Options& options = out.options = std::move(named.image);
  if (out.format.empty()) {
    // As qemu-img: then it is guessed from the file.
    out.guessed = true;
    out.format = inspect_image(graph, named_file(name), {.locked = false}).format;
  }
  options.set("driver", out.format);
  set_options(options, mode);
  if (!options.has("read-only")) options.set("read-only", mode.writable ? "off" : "on");
  if (out.format == "qcow2" && !options.has("backing")) {
    if (!mode.with_backing) {
      options.set_null("backing");
    } else if (named.is_path) {
      add_references(graph, out.path, mode, options);
    }
  }
  const std::string protocol = named.file.peek("driver").value_or("");
  const bool is_file = protocol == "file" || protocol == "host_device";
  if (is_file && mode.force_share && !named.file.has("locking")) named.file.set("locking", "off");
  options.set_child("file", std::move(named.file));
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
  // The name once is enough.
  const std::string text = error.what();
  const std::string begin = path + ": ";
  if (!text.starts_with(begin)) {
    error.prepend(where);
    throw error;
  }
  throw Error(error.err(), fmt::format("{}: {}", where, text.substr(begin.size())));
}

namespace {

void require_possible(const OpenMode& mode, const std::string& format) {
  if (mode.writable && mode.force_share) {
    throw Error(EINVAL, "force-share=on can only be used with read-only images");
  }
  if (mode.snapshot.empty() || format == "qcow2") return;
  throw Error(ENOTSUP, fmt::format("Failed to load snapshot: Block format '{}' used by device '' "
                                   "does not support temporarily loading internal snapshots",
                                   format));
}

// A snapshot that is not there is no reason not to open the image, as qemu-img sees it.
[[noreturn]] void refuse(Error& error, const Description& found, const std::string& name,
                         const OpenMode& mode) {
  const std::string text = error.what();
  constexpr std::string_view kSnapshot = "Failed to load snapshot: ";
  constexpr std::string_view kNone = "Can't find snapshot";
  if (!mode.snapshot.empty() && text.starts_with(kSnapshot)) throw error;
  if (!mode.snapshot.empty() && text.ends_with(kNone)) {
    throw Error(error.err(), fmt::format("{}{}", kSnapshot, kNone));
  }
  refuse_open(error, found.path, name, mode.writable);
}

}  // namespace

void warn_of_guess(const std::string& name) {
  std::fflush(stdout);
  fmt::print(stderr,
             "WARNING: Image format was not specified for '{}' and probing guessed raw.\n"
             "         Automatically detecting the format is dangerous for raw images, write "
             "operations on block 0 will be restricted.\n"
             "         Specify the 'raw' format explicitly to remove the restrictions.\n",
             name);
}

OpenImage::OpenImage(ImageGraph& graph, const ImageName& name, const OpenMode& mode)
    : graph_(graph.graph()), name_(name.text) {
  Description found;
  try {
    const auto describe = name.is_options ? &describe_options : &describe_path;
    describe(graph, name, mode, found);
    format_ = found.format;
    guessed_ = found.guessed;
    require_possible(mode, format_);
    const std::shared_ptr<block::Node> node = graph_.add(std::move(found.options));
    node_name_ = node->name();
    const uint8_t uses = mode.writable ? Permissions::kWrite | Permissions::kResize : 0;
    edge_ = std::make_unique<block::Edge>(
        node, "the image command",
        Permissions{.uses = uses, .shares = Permissions::kWrite | Permissions::kResize});
  } catch (Error& e) {
    refuse(e, found, name_, mode);
  }
  if (mode.writable && guessed_ && format_ == "raw") warn_of_guess(name_);
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
