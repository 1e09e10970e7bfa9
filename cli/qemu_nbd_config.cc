// SPDX-License-Identifier: Apache-2.0
// What qemu-nbd was asked for, as a run of the daemon.
#include <string>

#include <cerrno>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/tls_object.h"
#include "cli/image_open.h"
#include "cli/qemu_nbd.h"
#include "control/readiness.h"
#include "control/specs.h"

namespace minivmm::cli {

using base::Error;
using block::Options;

namespace {

constexpr const char* kNode = "disk";

std::string doubled_commas(const std::string& text) {
  std::string out;
  for (const char c : text) out.append(c == ',' ? 2 : 1, c);
  return out;
}

// "NAME", or "snapshot.id=ID,snapshot.name=NAME".
void choose_snapshot(Options& node, const std::string& text) {
  if (text.find("snapshot.") != 0) return node.set("snapshot", text);
  Options given = Options::from_keys(text);
  if (auto id = given.take_string("snapshot.id")) node.set("snapshot-id", *id);
  if (auto name = given.take_string("snapshot.name")) node.set("snapshot-name", *name);
  given.finish("-l");
}

// Puts a node of a driver on the present one, which hands it its name and what is the top's.
Options& put_on_top(Options& node, const char* driver) {
  Options inner = std::exchange(node, {});
  (void)inner.take_string("node-name");
  node.set("driver", driver);
  node.set("node-name", kNode);
  if (inner.peek("read-only") == "on") node.set("read-only", "on");
  if (auto mode = inner.take_string("cache.writeback")) node.set("cache.writeback", *mode);
  node.set_child("file", std::move(inner));
  return node;
}

// Without --image-opts the modes are the image's own.
void check_aio(const QemuNbdRequest& wanted) {
  if (wanted.aio != "native" || wanted.image_opts) return;
  if (wanted.cache == "none" || wanted.cache == "directsync") return;
  throw Error(EINVAL, fmt::format("Failed to blk_new_open '{}': aio=native was specified, but it "
                                  "requires cache.direct=on, which was not specified.",
                                  wanted.file));
}

control::Disk disk_of(const QemuNbdRequest& wanted) {
  std::string text = wanted.image_opts ? wanted.file : doubled_commas(wanted.file);
  if (wanted.image_opts) {
    if (!wanted.format.empty()) {
      throw Error(EINVAL, "--image-opts and -f are mutually exclusive");
    }
    if (wanted.file.find('=') == std::string::npos) {
      throw Error(EINVAL,
                  fmt::format("Failed to blk_new_open '{0}': options such as driver=raw are "
                              "expected, not '{0}'",
                              wanted.file));
    }
    if (wanted.read_only) text += ",read-only=on";
  } else {
    if (!wanted.format.empty()) text += ",format=" + wanted.format;
    if (!wanted.cache.empty()) text += ",cache=" + wanted.cache;
    if (wanted.read_only) text += ",ro=on";
  }
  if (wanted.temporary) text += ",snapshot=on";
  check_aio(wanted);
  control::Disk out = control::parse_disk(text + ",id=" + kNode, 0);
  if (!std::exchange(out.notice, {}).empty()) warn_of_guess(wanted.file);
  if (!wanted.snapshot.empty()) choose_snapshot(out.node, wanted.snapshot);
  if (wanted.offset != 0) {
    put_on_top(out.node, "raw").set("offset", std::to_string(wanted.offset));
  }
  // As QEMU has it: nothing is discarded unless somebody says so. What a temporary overlay holds
  // does not matter.
  const bool plain = wanted.discard && wanted.detect_zeroes == "off";
  if (!plain && !out.read_only && !out.snapshot) {
    Options& policy = put_on_top(out.node, "write-policy");
    policy.set("detect-zeroes", wanted.detect_zeroes);
    policy.set("discard", wanted.discard ? "unmap" : "ignore");
  }
  return out;
}

control::Export export_of(const QemuNbdRequest& wanted, bool writable) {
  control::Export out;
  out.node_name = kNode;
  out.name = wanted.name;
  out.description = wanted.description;
  out.writable = writable;
  out.nbd = true;
  out.contexts.emplace();
  if (wanted.allocation_depth) out.contexts->emplace_back("qemu:allocation-depth");
  for (const std::string& bitmap : wanted.bitmaps) {
    out.contexts->push_back("qemu:dirty-bitmap:" + bitmap);
  }
  if (!wanted.tls_authz.empty()) {
    out.allow = {block::crypto::tls_objects().identity(wanted.tls_authz)};
  }
  return out;
}

void add_listeners(control::Config& config, const QemuNbdRequest& wanted) {
  const std::vector<int> inherited = control::inherited_sockets();
  const bool somewhere = !wanted.socket.empty() || wanted.bind_given;
  if (!inherited.empty() && somewhere) {
    throw Error(EINVAL,
                "IP address and port or socket path can't be set when using socket "
                "activation");
  }
  for (const int fd : inherited) config.nbd.push_back({.uri = {}, .fd = fd});
  // The device's own connection is added by who makes it.
  const bool only_device = !wanted.device.empty() && wanted.socket.empty();
  if (!inherited.empty() || only_device) return;
  const std::string tls =
      wanted.tls_creds.empty() ? "" : ",tls-creds=" + doubled_commas(wanted.tls_creds);
  config.nbd.push_back(control::parse_nbd(doubled_commas(qemu_nbd_address(wanted).text()) + tls));
}

}  // namespace

base::NbdUri qemu_nbd_address(const QemuNbdRequest& wanted) {
  base::NbdUri out;
  if (!wanted.socket.empty()) {
    out.socket_path = wanted.socket;
    return out;
  }
  out.host = wanted.bind;
  out.port = wanted.port;
  return out;
}

control::Config qemu_nbd_config(const QemuNbdRequest& wanted) {
  control::Config config;
  // As QEMU has it: an image's recorded backing file is opened wherever it lies.
  config.open_policy.backing_roots = {"/"};
  if (!wanted.tls_creds.empty()) {
    try {
      (void)block::crypto::tls_objects().get(wanted.tls_creds, true);
    } catch (Error& e) {
      e.prepend("Failed to get TLS creds");
      throw;
    }
  }
  config.disks.push_back(disk_of(wanted));
  config.exports.push_back(export_of(wanted, !wanted.read_only && !config.disks[0].read_only));
  add_listeners(config, wanted);
  config.nbd_allow_remote = true;
  config.nbd_clients = wanted.shared;
  config.once = !wanted.persistent;
  config.pid_file = wanted.pid_file;
  return config;
}

}  // namespace minivmm::cli
