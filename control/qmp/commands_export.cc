// SPDX-License-Identifier: Apache-2.0
// What is published, and where: block-export-add, nbd-server-start and their like.
#include <string_view>

#include <algorithm>

#include <fmt/core.h>

#include "base/nbd_uri.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"
#include "control/specs.h"

namespace minivmm::control::qmp {
namespace {

// What an export's clients get to finish what is in flight, before they are cut off.
constexpr std::chrono::seconds kHardPatience{2};
constexpr std::chrono::seconds kSafePatience{10};
constexpr uint64_t kMostConnections = 1'000'000;
constexpr uint64_t kMostBytesOfAny = INT64_MAX;

// --- block-export-add ---

constexpr Parameter kAdd[] = {{"type", Kind::kString, false, "nbd|fuse"},
                              {"id", Kind::kString},
                              {"node-name", Kind::kString},
                              {"writable", Kind::kBoolean, true},
                              {"writethrough", Kind::kBoolean, true},
                              // NBD
                              {"name", Kind::kString, true},
                              {"description", Kind::kString, true},
                              {"bitmaps", Kind::kStrings, true},
                              {"allocation-depth", Kind::kBoolean, true},
                              {"allow", Kind::kStrings, true},
                              {"max-connections", Kind::kInteger, true},
                              {"in-flight", Kind::kInteger, true},
                              {"clone", Kind::kString, true, "memory|qcow2"},
                              {"clone-limit", Kind::kInteger, true},
                              {"clone-total", Kind::kInteger, true},
                              {"clone-dir", Kind::kString, true},
                              // FUSE
                              {"mountpoint", Kind::kString, true},
                              {"growable", Kind::kBoolean, true},
                              {"allow-other", Kind::kString, true, "off|on|auto"}};

void require_only_for(const Arguments& given, std::string_view type,
                      std::initializer_list<const char*> names) {
  for (const char* name : names) {
    if (given.has(name)) throw Failure(fmt::format("Parameter '{}' goes with type {}", name, type));
  }
}

// The letters that QEMU allows in an id.
void require_id(const std::string& id) {
  const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  const bool good = !id.empty() && letter(id[0]) && std::all_of(id.begin(), id.end(), [&](char c) {
    return letter(c) || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_';
  });
  if (!good) throw Failure("Invalid block export id");
}

// Each bitmap of a node can be seen by clients; naming them says that they are expected.
void require_bitmaps(Target& target, const Export& wanted, const Arguments& given) {
  if (!given.has("bitmaps")) return;
  block::DirtyBitmaps* const bitmaps = target.graph().find(wanted.node_name)->dirty_bitmaps();
  const auto there =
      bitmaps != nullptr ? bitmaps->list() : std::vector<block::DirtyBitmaps::Info>();
  for (const std::string& name : given.strings("bitmaps")) {
    const bool found = std::any_of(there.begin(), there.end(),
                                   [&](const auto& each) { return each.name == name; });
    if (!found) throw Failure(fmt::format("Bitmap '{}' is not found", name));
  }
}

// The same words as the command line's.
CloneOptions clone_options(const Arguments& given, const std::string& name) {
  block::Options options;
  options.set("clone", given.text("clone"));
  for (const char* key : {"clone-limit", "clone-total"}) {
    if (given.has(key)) options.set(key, std::to_string(given.integer(key, 1, kMostBytesOfAny)));
  }
  if (given.has("clone-dir")) options.set("clone-dir", given.text("clone-dir"));
  return *take_clone(options, name);
}

Export nbd_export(const Arguments& given, Export out) {
  require_only_for(given, "fuse", {"mountpoint", "growable", "allow-other"});
  out.nbd = true;
  out.name = given.text("name", out.node_name);
  out.description = given.text("description");
  out.allow = given.strings("allow");
  out.max_connections =
      static_cast<unsigned>(given.integer("max-connections", 0, kMostConnections));
  out.in_flight = given.integer("in-flight", 0, kMostBytesOfAny);
  if (given.has("clone")) {
    out.clone = clone_options(given, out.name);
  } else {
    for (const char* key : {"clone-limit", "clone-total", "clone-dir"}) {
      if (given.has(key)) throw Failure(fmt::format("Parameter '{}' goes with 'clone'", key));
    }
  }
  return out;
}

Export fuse_export(const Arguments& given, Export out) {
  require_only_for(given, "nbd",
                   {"description", "bitmaps", "allocation-depth", "allow", "max-connections",
                    "in-flight", "clone", "clone-limit", "clone-total", "clone-dir"});
  if (given.boolean("growable")) {
    throw Failure("Parameter 'growable': a file here has the size of its disk; see block_resize");
  }
  if (given.has("mountpoint") && given.has("name")) {
    throw Failure("Parameters 'mountpoint' and 'name' exclude each other: the former ends with it");
  }
  out.fuse = true;
  out.name = given.text("name", out.node_name);
  out.file = given.text("mountpoint");
  out.allow_other = given.text("allow-other") == "on";
  return out;
}

Json export_add(Target& target, const Arguments& given) {
  Export wanted;
  wanted.id = given.text("id");
  require_id(wanted.id);
  wanted.node_name = given.text("node-name");
  wanted.writable = given.boolean("writable");
  if (given.boolean("writethrough")) {
    throw Failure("Parameter 'writethrough' is a matter of the node here: cache.writeback=off");
  }
  (void)target.graph().find(wanted.node_name);
  wanted = given.text("type") == "nbd" ? nbd_export(given, std::move(wanted))
                                       : fuse_export(given, std::move(wanted));
  require_bitmaps(target, wanted, given);
  target.front_ends().add(wanted);
  return Json::object();
}

// --- block-export-del ---

constexpr Parameter kDel[] = {{"id", Kind::kString}, {"mode", Kind::kString, true, "safe|hard"}};

Json export_del(Target& target, const Arguments& given) {
  const bool safe = given.text("mode", "safe") == "safe";
  target.front_ends().remove(given.text("id"), safe,
                             base::Clock::now() + (safe ? kSafePatience : kHardPatience));
  return Json::object();
}

// --- nbd-server-start, nbd-server-stop ---

constexpr Parameter kServerStart[] = {{"addr", Kind::kObject, true},
                                      {"uri", Kind::kString, true},
                                      {"tls-creds", Kind::kString, true},
                                      {"tls", Kind::kString, true, "required|optional"},
                                      {"max-connections", Kind::kInteger, true},
                                      {"max-per-client", Kind::kInteger, true},
                                      {"handshake-timeout", Kind::kInteger, true},
                                      {"idle-timeout", Kind::kInteger, true}};
constexpr Parameter kAddress[] = {{"type", Kind::kString, false, "unix|inet|vsock"},
                                  {"data", Kind::kObject, true},
                                  {"path", Kind::kString, true},
                                  {"host", Kind::kString, true},
                                  {"port", Kind::kString, true},
                                  {"cid", Kind::kString, true}};
constexpr Parameter kUnix[] = {{"path", Kind::kString}};
constexpr Parameter kInet[] = {{"host", Kind::kString}, {"port", Kind::kString}};
constexpr Parameter kVsock[] = {{"cid", Kind::kString}, {"port", Kind::kString}};

template <typename Number>
Number number_of(const Arguments& given, const char* name) {
  block::Options text;
  text.set(name, given.text(name));
  return static_cast<Number>(text.take_uint(name, 0, 0, std::numeric_limits<Number>::max()));
}

// QMP's SocketAddress, in both of its forms: {"type": .., "data": {..}} and all in one.
std::string uri_of(const Json& address) {
  const Arguments given(kAddress, address);
  const std::string type = given.text("type");
  Json data = given.all();
  data.erase("type");
  if (given.has("data")) data = given.json("data");
  base::NbdUri uri;
  if (type == "unix") {
    uri.socket_path = Arguments(kUnix, std::move(data)).text("path");
    if (uri.socket_path.empty()) throw Failure("Parameter 'path' is empty");
  } else if (type == "inet") {
    const Arguments inet(kInet, std::move(data));
    uri.host = inet.text("host");
    uri.port = number_of<uint16_t>(inet, "port");
  } else {
    const Arguments vsock(kVsock, std::move(data));
    uri.vsock_cid = number_of<uint32_t>(vsock, "cid");
    uri.vsock_port = number_of<uint32_t>(vsock, "port");
  }
  return uri.text();
}

Json server_start(Target& target, const Arguments& given) {
  if (given.has("addr") == given.has("uri")) {
    throw Failure("One of the parameters 'addr' and 'uri' is expected");
  }
  constexpr uint64_t kMostSeconds = 7 * 24 * 3600;
  const std::string uri = given.has("uri") ? given.text("uri") : uri_of(given.json("addr"));
  // As behind --nbd, whose words these are.
  NbdListener wanted{.uri = uri};
  if (given.has("tls-creds")) {
    wanted.tls = tls_options(given.text("tls-creds"), given.text("tls") == "optional");
  }
  wanted.max_connections =
      static_cast<unsigned>(given.integer("max-connections", 0, kMostConnections));
  wanted.max_per_client =
      static_cast<unsigned>(given.integer("max-per-client", 0, kMostConnections));
  if (given.has("handshake-timeout")) {
    wanted.handshake_timeout =
        std::chrono::seconds(given.integer("handshake-timeout", 1, kMostSeconds));
  }
  if (given.has("idle-timeout")) {
    wanted.idle_timeout = std::chrono::seconds(given.integer("idle-timeout", 0, kMostSeconds));
  }
  return {{"uri", target.front_ends().start_nbd(wanted)}};
}

Json server_stop(Target& target, const Arguments&) {
  target.front_ends().stop_nbd(base::Clock::now() + kHardPatience);
  return Json::object();
}

constexpr Command kCommands[] = {
    {"block-export-add", kAdd, export_add},
    {"block-export-del", kDel, export_del},
    {"nbd-server-start", kServerStart, server_start},
    {"nbd-server-stop", {}, server_stop},
};

}  // namespace

std::span<const Command> export_commands() { return kCommands; }

}  // namespace minivmm::control::qmp
