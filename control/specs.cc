// SPDX-License-Identifier: Apache-2.0
#include "control/specs.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <sstream>
#include <vector>

#include <fmt/core.h>
#include <limits.h>

#include "base/error.h"
#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "block/crypto/tls_object.h"
#include "block/formats/probe.h"

namespace minivmm::control {

using base::Error;
using block::Options;

namespace {

constexpr unsigned kMostProcessors = 1023;

// Splits "FIRST,rest": the part before the first single comma, commas in it undoubled.
std::string take_first(std::string_view& text) {
  std::string first;
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if (text[at] == ',') {
      if (at + 1 >= text.size() || text[at + 1] != ',') break;
      ++at;
    }
    first.push_back(text[at]);
  }
  text.remove_prefix(std::min(at + 1, text.size()));
  return first;
}

template <typename Work>
auto with_context(std::string_view option, std::string_view text, Work work) {
  try {
    return work();
  } catch (Error& e) {
    e.prepend(fmt::format("{} {}", option, text));
    throw;
  }
}

struct CacheMode {
  std::string_view name;
  bool direct;
  bool no_flush;
  bool write_through;
};

// QEMU's cache modes.
constexpr CacheMode kCacheModes[] = {
    {"writeback", false, false, false},   {"none", true, false, false},
    {"writethrough", false, false, true}, {"unsafe", false, true, false},
    {"directsync", true, false, true},
};

void apply_cache_mode(Options& node, Options& given) {
  const auto name = given.take_string("cache");
  if (!name) return;
  for (const CacheMode& mode : kCacheModes) {
    if (mode.name != *name) continue;
    node.set("file.cache.direct", mode.direct ? "on" : "off");
    node.set("file.cache.no-flush", mode.no_flush ? "on" : "off");
    if (mode.write_through) node.set("cache.writeback", "off");
    return;
  }
  throw Error(EINVAL, fmt::format("option 'cache={}': one of writeback, none, writethrough, "
                                  "unsafe, directsync is expected",
                                  *name));
}

virtio::ErrorAction take_error_action(Options& given, const char* key) {
  using virtio::ErrorAction;
  constexpr ErrorAction kActions[] = {ErrorAction::kReport, ErrorAction::kIgnore,
                                      ErrorAction::kStop, ErrorAction::kNoSpace};
  return kActions[given.take_choice(key, {"report", "ignore", "stop", "enospc"}, 0)];
}

DiskDevice take_device(Options& given, bool cdrom) {
  DiskDevice device;
  const uint32_t usual_block = cdrom ? 2048 : 512;
  device.serial = given.take_string("serial").value_or("");
  device.logical_block_size =
      static_cast<uint32_t>(given.take_uint("logical_block_size", usual_block, 512, 32768));
  device.physical_block_size =
      static_cast<uint32_t>(given.take_uint("physical_block_size", 0, 512, 32768));
  device.num_queues = static_cast<uint16_t>(given.take_uint("num-queues", 1, 1, 64));
  device.queue_size = static_cast<uint16_t>(given.take_uint("queue-size", 256, 4, 1024));
  device.read_error = take_error_action(given, "rerror");
  device.write_error = take_error_action(given, "werror");
  device.indirect = given.take_bool("indirect_desc", true);
  device.event_index = given.take_bool("event_idx", true);
  device.legacy = given.take_bool("legacy", false);
  return device;
}

enum class Media { kDisk, kCdrom };

Media take_media(Options& given) {
  return given.take_choice("media", {"disk", "cdrom"}, 0) == 1 ? Media::kCdrom : Media::kDisk;
}

// Options of the path form that belong to the node.
void apply_node_options(Options& node, Options& given, const std::string& format) {
  apply_cache_mode(node, given);
  for (const char* key : {"locking", "reconnect-delay", "open-timeout", "request-timeout",
                          "connections", "tls-creds", "tls-hostname"}) {
    if (auto value = given.take_string(key)) node.set(std::string("file.") + key, *value);
  }
  for (const char* key : {"offset", "size"}) {
    auto value = given.take_string(key);
    if (!value) continue;
    if (format != "raw") {
      throw Error(EINVAL,
                  fmt::format("option '{}' is for raw images; this one is {}", key, format));
    }
    node.set(key, *value);
  }
  const auto backing = given.take_string("backing");
  const auto backing_format = given.take_string("backing_fmt");
  if (backing) {
    bool guessed = false;
    node.set_child("backing", image_options(*backing, backing_format.value_or(""), true, &guessed));
  } else if (backing_format) {
    throw Error(EINVAL, "option 'backing_fmt' goes with 'backing'");
  }
  for (const char* key : {"l2-cache-size", "refcount-cache-size", "cache-size",
                          "l2-cache-entry-size", "key-secret", "unlock-time"}) {
    if (auto value = given.take_string(key)) node.set(key, *value);
  }
  if (auto encrypt = given.take_child("encrypt")) {
    if (!encrypt->options) {
      throw Error(EINVAL, "'encrypt' has options of its own: encrypt.key-secret=ID");
    }
    node.set_child("encrypt", std::move(*encrypt->options));
  }
}

Disk parse_path_disk(std::string_view text, unsigned number) {
  std::string_view rest = text;
  const std::string path = take_first(rest);
  if (path.empty()) throw Error(EINVAL, "a path is expected");
  Options given = Options::from_keys(rest);
  Disk disk;
  disk.node_name = given.take_string("id").value_or(fmt::format("disk{}", number));
  const bool ro = given.take_bool("ro", false);
  const bool cdrom = take_media(given) == Media::kCdrom;
  disk.read_only = given.take_bool("readonly", ro) || ro || cdrom;
  disk.snapshot = given.take_bool("snapshot", false) && !disk.read_only;
  const std::string format = given.take_string("format").value_or("");
  bool guessed = false;
  disk.node = image_options(path, format, disk.read_only || disk.snapshot, &guessed);
  disk.node.set("node-name", disk.node_name);
  const std::string driver = *disk.node.peek("driver");
  disk.device = take_device(given, cdrom);
  apply_node_options(disk.node, given, driver);
  if (guessed && driver == "raw") {
    disk.notice = fmt::format(
        "{}: no format given and none recognised, so it is taken for raw; writes that would make "
        "it look like another format are refused (say format=raw to allow them)",
        path);
  }
  given.finish("--disk");
  return disk;
}

}  // namespace

std::string probe_file(const std::string& path) {
  const base::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd) throw base::errno_error(errno, fmt::format("{}: cannot open", path));
  std::byte first[block::kProbeBytes] = {};
  const ssize_t n = ::pread(fd.get(), first, sizeof first, 0);
  if (n < 0) throw base::errno_error(errno, fmt::format("{}: cannot read", path));
  return std::string(block::probe_format({first, static_cast<size_t>(n)}));
}

Options image_options(const std::string& path, const std::string& format, bool read_only,
                      bool* guessed) {
  const bool is_nbd = base::is_nbd_uri(path);
  std::string driver = format;
  *guessed = format.empty();
  // What a server has is not looked at before it is opened.
  if (driver.empty()) driver = is_nbd ? "raw" : probe_file(path);
  Options node;
  node.set("driver", driver);
  if (read_only) node.set("read-only", "on");
  if (*guessed && driver == "raw" && !read_only) node.set("probed", "on");
  node.set("file.driver", is_nbd ? "nbd" : "file");
  node.set(is_nbd ? "file.uri" : "file.filename", path);
  return node;
}

Disk parse_disk(std::string_view text, unsigned number) {
  return with_context("--disk", text, [&] {
    const bool described = text.starts_with('{') || text.starts_with("driver=") ||
                           text.find(",driver=") != std::string_view::npos;
    if (!described) return parse_path_disk(text, number);
    Disk disk;
    disk.node = Options::from_text(text);
    const bool cdrom = take_media(disk.node) == Media::kCdrom;
    if (cdrom && !disk.node.has("read-only")) disk.node.set("read-only", "on");
    disk.snapshot = disk.node.take_bool("snapshot", false);
    disk.device = take_device(disk.node, cdrom);
    auto id = disk.node.take_string("id");
    disk.node_name =
        disk.node.peek("node-name").value_or(id.value_or(fmt::format("disk{}", number)));
    if (!disk.node.has("node-name")) disk.node.set("node-name", disk.node_name);
    Options copy = disk.node;  // the node wants to read it too
    disk.read_only = copy.take_bool("read-only", false);
    if (cdrom && !disk.read_only) throw Error(EINVAL, "media=cdrom cannot be written to");
    disk.snapshot = disk.snapshot && !disk.read_only;
    if (disk.snapshot) {
      (void)disk.node.take_string("read-only");
      disk.node.set("read-only", "on");
    }
    return disk;
  });
}

namespace {

// "a;b": a distinguished name has commas.
std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ';');) {
    if (!word.empty()) out.push_back(word);
  }
  if (out.empty()) throw Error(EINVAL, "option 'allow': the names of clients are expected");
  return out;
}

// 0 where it is not given: any number.
unsigned take_count(Options& given, const char* key) {
  constexpr uint64_t kMost = 1'000'000;
  return given.has(key) ? static_cast<unsigned>(given.take_uint(key, 1, 1, kMost)) : 0;
}

std::optional<std::chrono::milliseconds> take_seconds(Options& given, const char* key,
                                                      uint64_t least) {
  constexpr uint64_t kMost = 7 * 24 * 3600;
  if (!given.has(key)) return std::nullopt;
  return std::chrono::seconds(given.take_uint(key, least, least, kMost));
}

nbd::TlsOptions take_tls(Options& given) {
  const auto id = given.take_string("tls-creds");
  const size_t mode = given.take_choice("tls", {"required", "optional"}, 0);
  return id ? tls_options(*id, mode == 1) : nbd::TlsOptions();
}

}  // namespace

nbd::TlsOptions tls_options(const std::string& id, bool optional) {
  const block::crypto::TlsObject object = block::crypto::tls_objects().get(id, true);
  nbd::TlsOptions out;
  out.mode = optional ? nbd::TlsOptions::Mode::kOptional : nbd::TlsOptions::Mode::kRequired;
  out.kind = object.kind == block::crypto::TlsObject::Kind::kX509 ? nbd::TlsOptions::Kind::kX509
                                                                  : nbd::TlsOptions::Kind::kPsk;
  out.directory = object.directory;
  out.verify_peer = object.verify_peer;
  out.priority = object.priority;
  return out;
}

namespace {

// Where nothing is said, so much memory for all clones of an export.
constexpr uint64_t kUsualCloneMemory = uint64_t{1} << 30;

void require_file_name(const std::string& name) {
  if (!name.empty() && name.find('/') == std::string::npos && name.front() != '.') return;
  throw Error(EINVAL, fmt::format("'clone-dir' needs an export name that can be a part of a file's "
                                  "name, not '{}': give name=",
                                  name));
}

}  // namespace

std::optional<CloneOptions> take_clone(Options& given, const std::string& export_name) {
  const std::string kind = given.take_string("clone").value_or("off");
  const auto limit = given.take_size("clone-limit");
  const auto total = given.take_size("clone-total");
  const auto directory = given.take_string("clone-dir");
  if (kind == "off") {
    if (!limit && !total && !directory) return std::nullopt;
    throw Error(EINVAL, "options 'clone-limit', 'clone-total' and 'clone-dir' go with 'clone'");
  }
  if (kind != "on" && kind != "memory" && kind != "qcow2") {
    throw Error(EINVAL, fmt::format("option 'clone={}': memory or qcow2 is expected", kind));
  }
  CloneOptions clone;
  clone.in_memory = kind != "qcow2";
  clone.limit = limit.value_or(UINT64_MAX);
  clone.total = total.value_or(clone.in_memory ? kUsualCloneMemory : UINT64_MAX);
  if (directory) {
    if (clone.in_memory) throw Error(EINVAL, "option 'clone-dir' goes with clone=qcow2");
    require_file_name(export_name);
    clone.directory = *directory;
  }
  return clone;
}

Export parse_export(std::string_view text) {
  return with_context("--export", text, [&] {
    std::string_view rest = text;
    Export out;
    out.node_name = take_first(rest);
    if (out.node_name.empty()) throw Error(EINVAL, "a node's name is expected first");
    Options given = Options::from_keys(rest);
    out.name = given.take_string("name").value_or(out.node_name);
    out.description = given.take_string("description").value_or("");
    out.writable = given.take_bool("writable", false);
    if (const auto allow = given.take_string("allow")) out.allow = split(*allow);
    out.in_flight = given.take_size("in-flight").value_or(0);
    out.max_connections = take_count(given, "max-connections");
    out.nbd = given.take_bool("nbd", false);
    out.fuse = given.take_bool("fuse", false);
    // None named: through every front end that is open.
    if (!out.nbd && !out.fuse) out.every_front_end = out.nbd = out.fuse = true;
    out.clone = take_clone(given, out.name);
    if (out.clone) {
      if (out.fuse && !out.every_front_end) {
        throw Error(EINVAL, "only NBD clients can have clones");
      }
      out.fuse = out.every_front_end = false;
      out.nbd = true;
    }
    given.finish("--export");
    return out;
  });
}

std::pair<std::string, std::vector<unsigned>> parse_pin(std::string_view text) {
  return with_context("--pin", text, [&] {
    const Error wrong(EINVAL, "THREAD=CPUS is expected, such as vcpu0=2 or io0=0-1,4");
    const size_t equals = text.find('=');
    if (equals == 0 || equals == std::string_view::npos) throw wrong;
    std::pair<std::string, std::vector<unsigned>> out{std::string(text.substr(0, equals)), {}};
    const char* at = text.data() + equals + 1;
    const char* const end = text.data() + text.size();
    const auto number = [&] {
      unsigned value = 0;
      const auto parsed = std::from_chars(at, end, value);
      if (parsed.ec != std::errc() || value > kMostProcessors) throw wrong;
      at = parsed.ptr;
      return value;
    };
    for (;;) {
      const unsigned first = number();
      unsigned last = first;
      if (at != end && *at == '-') {
        ++at;
        last = number();
      }
      if (last < first) throw wrong;
      for (unsigned i = first; i <= last; ++i) out.second.push_back(i);
      if (at == end) return out;
      if (*at++ != ',') throw wrong;
    }
  });
}

FuseMount parse_fuse(std::string_view text) {
  return with_context("--fuse", text, [&] {
    std::string_view rest = text;
    FuseMount mount;
    mount.directory = take_first(rest);
    if (mount.directory.empty()) throw Error(EINVAL, "a directory is expected first");
    Options given = Options::from_keys(rest);
    if (const auto mode = given.take_string("mode")) {
      const char* end = mode->data() + mode->size();
      const auto parsed = std::from_chars(mode->data(), end, mount.options.mode, 8);
      if (parsed.ec != std::errc() || parsed.ptr != end || mount.options.mode > 0777) {
        throw Error(EINVAL,
                    fmt::format("option 'mode={}': an octal mode such as 0640 is expected", *mode));
      }
    }
    const auto take_id = [&](const char* key, std::optional<uint32_t>& to) {
      if (given.has(key)) to = static_cast<uint32_t>(given.take_uint(key, 0, 0, UINT32_MAX - 1));
    };
    take_id("uid", mount.options.uid);
    take_id("gid", mount.options.gid);
    mount.options.allow_other = given.take_bool("allow_other", false);
    given.finish("--fuse");
    return mount;
  });
}

NbdListener parse_nbd(std::string_view text) {
  return with_context("--nbd", text, [&] {
    NbdListener listener;
    std::string_view rest = text;
    const std::string first = take_first(rest);
    constexpr std::string_view kFd = "fd:";
    if (first.starts_with(kFd)) {
      Options number;
      number.set("fd", first.substr(kFd.size()));
      listener.fd = static_cast<int>(number.take_uint("fd", 0, 0, INT_MAX));
    } else if (first == "stdio") {
      listener.stdio = true;
    } else {
      listener.uri = first;
    }
    Options given = Options::from_keys(rest);
    listener.tls = take_tls(given);
    listener.handshake_timeout = take_seconds(given, "handshake-timeout", 1);
    listener.idle_timeout = take_seconds(given, "idle-timeout", 0);
    listener.max_connections = take_count(given, "max-connections");
    listener.max_per_client = take_count(given, "max-per-client");
    given.finish("--nbd");
    return listener;
  });
}

}  // namespace minivmm::control
