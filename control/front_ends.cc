// SPDX-License-Identifier: Apache-2.0
#include "control/front_ends.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <filesystem>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"
#include "control/clone_maker.h"
#include "control/readiness.h"
#include "fuse/mountpoint.h"

namespace minivmm::control {

using base::Error;
using block::Permissions;

namespace {

// Where it is, whether it is there or not. May block.
std::string place_of(const std::string& directory) {
  try {
    return fuse::resolve_mountpoint(directory);
  } catch (const Error&) {
    return directory;  // mounting says what is wrong with it
  }
}

}  // namespace

FrontEnds::FrontEnds(base::LoopGroup& loops, block::Graph& graph, const Config& config,
                     Callbacks callbacks)
    : loops_(loops), graph_(graph), config_(config), callbacks_(std::move(callbacks)) {
  if (!config_.nbd.empty()) (void)make_nbd();
  for (const FuseMount& mount : config_.fuse) {
    mounts_.push_back({make_mount(mount), place_of(mount.directory)});
  }
}

std::shared_ptr<nbd::Server> FrontEnds::nbd() const {
  const std::lock_guard lock(mutex_);
  return nbd_;
}

FrontEnds::Mounts FrontEnds::mounts() const {
  const std::lock_guard lock(mutex_);
  Mounts out;
  for (const OwnMount& each : mounts_) {
    if (each.stage == Stage::kThere) out.push_back(each.mount);
  }
  return out;
}

std::shared_ptr<nbd::Server> FrontEnds::make_nbd() {
  nbd::ServerOptions options;
  if (config_.nbd_clients != 0) options.max_connections = config_.nbd_clients;
  const bool all_connected =
      !config_.nbd.empty() &&
      std::all_of(config_.nbd.begin(), config_.nbd.end(), [](const NbdListener& each) {
        return each.stdio || (each.fd >= 0 && is_connected_socket(each.fd));
      });
  // Where nobody else can come there is nothing to wait for.
  if (config_.once || all_connected) {
    options.on_last_left = [this, all_connected](bool entered) {
      if (!entered && !all_connected) return;
      if (callbacks_.last_client_left) callbacks_.last_client_left();
    };
  }
  auto made = std::make_shared<nbd::Server>(loops_, options);
  const std::lock_guard lock(mutex_);
  nbd_ = made;
  return made;
}

std::shared_ptr<fuse::Mount> FrontEnds::make_mount(const FuseMount& wanted) {
  auto made = std::make_shared<fuse::Mount>(loops_, wanted.directory, wanted.options);
  made->on_unmounted([this] {
    if (callbacks_.unmounted) callbacks_.unmounted();
  });
  return made;
}

// --- exports ---

void FrontEnds::publish_configured() {
  for (const Export& wanted : config_.exports) publish(wanted);
}

FrontEnds::Published FrontEnds::description_of(const Export& wanted, bool nbd) {
  return {.id = wanted.id.empty() ? wanted.name + (nbd ? ".nbd" : ".fuse") : wanted.id,
          .nbd = nbd,
          .node_name = wanted.node_name,
          .name = wanted.name,
          .writable = wanted.writable || (nbd && wanted.clone.has_value())};
}

void FrontEnds::publish(const Export& wanted) {
  if (const auto server = nbd(); wanted.nbd && server) {
    publish_nbd(wanted, *server);
    const std::lock_guard lock(mutex_);
    published_.push_back({description_of(wanted, true), Stage::kThere, server, {}});
  }
  if (const Mounts all = mounts(); wanted.fuse && !all.empty()) {
    publish_fuse(wanted, all);
    const std::lock_guard lock(mutex_);
    published_.push_back({description_of(wanted, false), Stage::kThere, nullptr, all});
  }
}

// Under mutex_. Null: there is none.
FrontEnds::Entry* FrontEnds::find(const std::string& id) {
  const auto found = std::find_if(published_.begin(), published_.end(),
                                  [&](const Entry& each) { return each.what.id == id; });
  return found == published_.end() ? nullptr : &*found;
}

// Takes the id. Returns the server that an NBD export is to be one of.
std::shared_ptr<nbd::Server> FrontEnds::begin_adding(const Export& wanted) {
  const std::lock_guard lock(mutex_);
  if (find(wanted.id) != nullptr) {
    throw Error(EEXIST, fmt::format("Block export id '{}' is already in use", wanted.id));
  }
  if (wanted.nbd && !nbd_) {
    throw Error(EINVAL, "NBD server not running: start one with nbd-server-start");
  }
  const auto server = wanted.nbd ? nbd_ : nullptr;
  published_.push_back({description_of(wanted, wanted.nbd), Stage::kComing, server, {}});
  return server;
}

void FrontEnds::end_adding(const std::string& id) {
  if (stay(id)) return;
  throw Error(ESHUTDOWN, fmt::format("export '{}': the NBD server was stopped meanwhile", id));
}

// False: it went with its server, and is forgotten.
bool FrontEnds::stay(const std::string& id) {
  const std::lock_guard lock(mutex_);
  Entry& entry = *find(id);
  entry.stage = Stage::kThere;
  if (!entry.server || entry.server == nbd_) return true;
  std::erase_if(published_, [&](const Entry& each) { return each.what.id == id; });
  return false;
}

void FrontEnds::add(const Export& wanted) {
  const std::shared_ptr<nbd::Server> server = begin_adding(wanted);
  try {
    if (server) {
      publish_nbd(wanted, *server);
    } else if (!wanted.file.empty()) {
      publish_file(wanted);
    } else if (const Mounts all = claim_mounts(wanted.id); !all.empty()) {
      publish_fuse(wanted, all);
    } else {
      throw Error(EINVAL, "there is no FUSE mount: name the file to show with 'mountpoint'");
    }
  } catch (...) {
    const auto until = base::Clock::now() + std::chrono::seconds(1);
    for (const auto& mount : forget(wanted.id)) drop_mount(mount, until);
    throw;
  }
  end_adding(wanted.id);
}

block::Handle FrontEnds::attach(const Export& wanted, const char* front_end) {
  return graph_.attach(wanted.node_name, fmt::format("{} export '{}'", front_end, wanted.name),
                       Permissions::front_end(wanted.writable));
}

void FrontEnds::publish_nbd(const Export& wanted, nbd::Server& server) {
  nbd::ExportOptions options{.description = wanted.description,
                             .writable = wanted.writable,
                             .allow = wanted.allow,
                             .contexts = wanted.contexts,
                             .multi_conn = config_.nbd_clients != 1,
                             .memory = wanted.in_flight,
                             .max_connections = wanted.max_connections};
  if (wanted.clone) {
    // Nobody may write to it while there are clones, or may come to be.
    block::Handle base =
        graph_.attach(wanted.node_name, fmt::format("NBD clone export '{}'", wanted.name),
                      Permissions::backing());
    auto maker =
        base::Pool::errands().run([&] { return std::make_shared<CloneMaker>(graph_, wanted); });
    server.add_clone_export(wanted.name, std::move(base), std::move(maker), std::move(options));
  } else {
    server.add_export(wanted.name, attach(wanted, "NBD"), std::move(options));
  }
}

// In all of the mounts, or in none.
void FrontEnds::publish_fuse(const Export& wanted, const Mounts& mounts) {
  size_t done = 0;
  try {
    for (; done < mounts.size(); ++done) {
      mounts[done]->add_file(wanted.name, attach(wanted, "FUSE"), {.writable = wanted.writable});
    }
  } catch (...) {
    while (done > 0) mounts[--done]->remove_file(wanted.name, std::chrono::seconds(1));
    throw;
  }
}

// Those that there are; they stay while the file is in them.
FrontEnds::Mounts FrontEnds::claim_mounts(const std::string& id) {
  const std::lock_guard lock(mutex_);
  Entry& entry = *find(id);
  for (const OwnMount& each : mounts_) {
    if (each.stage == Stage::kThere) entry.mounts.push_back(each.mount);
  }
  return entry.mounts;
}

// The mount of a directory, and whether it is new: then it is to be started. Waits where another
// command makes or ends one there.
std::pair<std::shared_ptr<fuse::Mount>, bool> FrontEnds::claim_mount(const std::string& id,
                                                                     const FuseMount& wanted) {
  const std::string place = base::Pool::errands().run([&] { return place_of(wanted.directory); });
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto found = std::find_if(mounts_.begin(), mounts_.end(),
                                    [&](const OwnMount& each) { return each.place == place; });
    if (found == mounts_.end()) {
      mounts_.push_back({make_mount(wanted), place, true, Stage::kComing});
      find(id)->mounts = {mounts_.back().mount};
      return {mounts_.back().mount, true};
    }
    if (found->stage == Stage::kThere) {
      find(id)->mounts = {found->mount};
      return {found->mount, false};
    }
    mounts_changed_.wait(lock, "a FUSE mount that comes or goes");
  }
}

// Where `wanted.file` says.
void FrontEnds::publish_file(const Export& wanted) {
  const std::filesystem::path path(wanted.file);
  Export named = wanted;
  named.name = path.filename().string();
  if (named.name.empty()) {
    throw Error(EINVAL,
                fmt::format("{}: names a directory; name the file to show in it", wanted.file));
  }
  {
    const std::lock_guard lock(mutex_);
    find(wanted.id)->what.name = named.name;
  }
  FuseMount directory{path.has_parent_path() ? path.parent_path().string() : ".", {}};
  directory.options.allow_other = wanted.allow_other;
  const auto [mount, made] = claim_mount(wanted.id, directory);
  publish_fuse(named, {mount});
  if (!made) return;
  mount->start();
  const std::lock_guard lock(mutex_);
  for (OwnMount& each : mounts_) {
    if (each.mount == mount) each.stage = Stage::kThere;
  }
  mounts_changed_.notify_all();
}

// Returns the mounts that it was in.
FrontEnds::Mounts FrontEnds::forget(const std::string& id) {
  const std::lock_guard lock(mutex_);
  Entry* const entry = find(id);
  if (entry == nullptr) return {};
  Mounts out = std::move(entry->mounts);
  std::erase_if(published_, [&](const Entry& each) { return each.what.id == id; });
  return out;
}

FrontEnds::Entry FrontEnds::begin_removing(const std::string& id) {
  const std::lock_guard lock(mutex_);
  Entry* const entry = find(id);
  if (entry == nullptr || entry->stage == Stage::kComing) {
    throw Error(ENOENT, fmt::format("Export '{}' is not found", id));
  }
  if (entry->stage == Stage::kGoing) {
    throw Error(EBUSY, fmt::format("Export '{}' is already shutting down", id));
  }
  entry->stage = Stage::kGoing;
  return *entry;
}

void FrontEnds::remove(const std::string& id, bool only_unused, base::Clock::time_point deadline) {
  const Entry entry = begin_removing(id);
  std::exception_ptr error;
  try {
    withdraw(entry, only_unused, deadline);
  } catch (const Error& e) {
    if (e.err() == EBUSY && only_unused && stay(id)) {
      throw Error(EBUSY, fmt::format("export '{}' still in use: {}; mode 'hard' cuts its users off",
                                     id, e.what()));
    }
    error = std::current_exception();
  } catch (...) {
    error = std::current_exception();
  }
  // It has gone, however it ended.
  for (const auto& mount : forget(id)) drop_mount(mount, deadline);
  if (callbacks_.export_deleted) callbacks_.export_deleted(id);
  if (error) std::rethrow_exception(error);
}

void FrontEnds::withdraw(const Entry& entry, bool only_unused, base::Clock::time_point deadline) {
  if (entry.what.nbd) {
    entry.server->remove_export(entry.what.name, deadline, only_unused);
    return;
  }
  const auto left = [deadline] {
    return std::max(std::chrono::ceil<std::chrono::milliseconds>(deadline - base::Clock::now()),
                    std::chrono::milliseconds(0));
  };
  // Where several mounts show it and one is in use: those before it have lost it.
  for (const auto& mount : entry.mounts) {
    mount->remove_file(entry.what.name, left(), only_unused);
    only_unused = false;
  }
}

// Once it shows nothing any more, if a command made it.
void FrontEnds::drop_mount(const std::shared_ptr<fuse::Mount>& mount,
                           base::Clock::time_point deadline) {
  {
    const std::lock_guard lock(mutex_);
    const bool in_use = std::any_of(published_.begin(), published_.end(), [&](const Entry& each) {
      return std::find(each.mounts.begin(), each.mounts.end(), mount) != each.mounts.end();
    });
    const auto found = std::find_if(mounts_.begin(), mounts_.end(), [&](const OwnMount& each) {
      return each.made_here && each.mount == mount && each.stage != Stage::kGoing;
    });
    if (in_use || found == mounts_.end()) return;
    found->stage = Stage::kGoing;
  }
  const auto left = deadline - base::Clock::now();
  for (const std::string& line : mount->stop(std::chrono::ceil<std::chrono::milliseconds>(left))) {
    base::log_warning("{}", line);
  }
  const std::lock_guard lock(mutex_);
  std::erase_if(mounts_, [&](const OwnMount& each) { return each.mount == mount; });
  mounts_changed_.notify_all();
}

// --- listeners and mounts ---

void FrontEnds::open() {
  const std::lock_guard serving(serving_);
  for (const auto& mount : mounts()) mount->start();
  const bool writable = std::any_of(config_.exports.begin(), config_.exports.end(),
                                    [](const Export& e) { return e.writable && e.nbd; });
  for (const NbdListener& wanted : config_.nbd) {
    if (!serve_connected(wanted)) (void)listen(*nbd(), wanted, writable);
  }
}

// True: it was no listener but a client.
bool FrontEnds::serve_connected(const NbdListener& wanted) {
  if (wanted.stdio) {
    nbd()->serve(take_standard_socket());
    return true;
  }
  if (wanted.fd < 0 || !is_connected_socket(wanted.fd)) return false;
  nbd()->serve(base::UniqueFd(wanted.fd));
  return true;
}

std::string FrontEnds::listen(nbd::Server& server, const NbdListener& wanted, bool warn) {
  nbd::ListenOptions options;
  options.uri = wanted.uri;
  options.allow_remote = config_.nbd_allow_remote;
  options.tls = wanted.tls;
  options.handshake_limit = wanted.handshake_timeout;
  options.idle_limit = wanted.idle_timeout;
  options.max_connections = wanted.max_connections;
  options.max_per_client = wanted.max_per_client;
  if (wanted.fd >= 0) options.fd.reset(wanted.fd);
  std::string uri = server.listen(std::move(options));
  if (warn && uri.starts_with("nbd://")) {
    base::log_warning("{}: writable by whoever can reach this TCP port", uri);
  }
  return uri;
}

std::string FrontEnds::start_nbd(const NbdListener& wanted) {
  const std::lock_guard serving(serving_);
  const auto there = nbd();
  const auto server = there ? there : make_nbd();
  try {
    return listen(*server, wanted, false);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    const bool used = std::any_of(published_.begin(), published_.end(),
                                  [&](const Entry& each) { return each.server == server; });
    if (!there && !used) nbd_.reset();
    throw;
  }
}

void FrontEnds::stop_nbd(base::Clock::time_point deadline) {
  const std::lock_guard serving(serving_);
  std::shared_ptr<nbd::Server> server;
  std::vector<std::string> ids;
  {
    const std::lock_guard lock(mutex_);
    server = std::move(nbd_);
    nbd_.reset();
    // Those that come or go just now find out themselves.
    for (Entry& each : published_) {
      if (!server || each.server != server || each.stage != Stage::kThere) continue;
      each.stage = Stage::kGoing;
      ids.push_back(each.what.id);
    }
  }
  if (!server) throw Error(ENOENT, "NBD server not running");
  const std::vector<std::string> problems = server->stop(deadline);
  for (const std::string& id : ids) {
    (void)forget(id);
    if (callbacks_.export_deleted) callbacks_.export_deleted(id);
  }
  if (!problems.empty()) throw Error(EIO, fmt::format("{}", fmt::join(problems, "; ")));
}

// --- what there is ---

std::vector<FrontEnds::Published> FrontEnds::published() const {
  const std::lock_guard lock(mutex_);
  std::vector<Published> out;
  for (const Entry& each : published_) {
    if (each.stage == Stage::kComing) continue;
    out.push_back(each.what);
    out.back().going = each.stage == Stage::kGoing;
  }
  return out;
}

std::vector<std::string> FrontEnds::uris() const {
  const auto server = nbd();
  return server ? server->uris() : std::vector<std::string>();
}

std::vector<std::string> FrontEnds::mountpoints() const {
  std::vector<std::string> out;
  for (const auto& mount : mounts()) out.push_back(mount->mountpoint());
  return out;
}

std::vector<std::string> FrontEnds::describe() const {
  std::vector<std::string> out;
  if (const auto server = nbd()) out = server->describe();
  for (const auto& mount : mounts()) {
    for (std::string& line : mount->describe()) out.push_back(std::move(line));
  }
  return out;
}

void FrontEnds::add_stops(std::vector<std::function<void()>>& parts,
                          std::chrono::milliseconds limit, const Report& report) {
  const auto on_loop = [this, report](const char* name, auto stop) {
    return [this, report, name, stop] { loops_.loop(0).call(name, [&] { report(stop()); }); };
  };
  if (const auto server = nbd()) {
    parts.emplace_back(
        on_loop("stop NBD", [server, limit] { return server->stop(base::Clock::now() + limit); }));
  }
  for (const auto& mount : mounts()) {
    parts.emplace_back(on_loop("stop FUSE", [mount, limit] { return mount->stop(limit); }));
  }
}

}  // namespace minivmm::control
