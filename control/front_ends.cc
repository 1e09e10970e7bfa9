// SPDX-License-Identifier: Apache-2.0
#include "control/front_ends.h"

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"
#include "control/clone_maker.h"
#include "control/readiness.h"

namespace minivmm::control {

using base::Error;
using block::Permissions;

FrontEnds::FrontEnds(base::LoopGroup& loops, block::Graph& graph, const Config& config,
                     Callbacks callbacks)
    : loops_(loops), graph_(graph), config_(config), callbacks_(std::move(callbacks)) {
  if (!config_.nbd.empty()) (void)make_nbd();
  for (const FuseMount& mount : config_.fuse) mounts_.push_back({make_mount(mount)});
}

std::shared_ptr<nbd::Server> FrontEnds::nbd() const {
  const std::lock_guard lock(mutex_);
  return nbd_;
}

FrontEnds::Mounts FrontEnds::mounts() const {
  const std::lock_guard lock(mutex_);
  Mounts out;
  for (const OwnMount& each : mounts_) out.push_back(each.mount);
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
  const std::lock_guard changing(changing_);
  for (const Export& wanted : config_.exports) publish(wanted);
}

void FrontEnds::add(const Export& wanted) {
  const std::lock_guard changing(changing_);
  for (const Published& each : published()) {
    if (each.id == wanted.id) {
      throw Error(EEXIST, fmt::format("Block export id '{}' is already in use", wanted.id));
    }
  }
  if (wanted.nbd) {
    if (!nbd()) throw Error(EINVAL, "NBD server not running: start one with nbd-server-start");
    publish_nbd(wanted);
  } else if (!wanted.file.empty()) {
    publish_file(wanted);
  } else if (const Mounts all = mounts(); !all.empty()) {
    publish_fuse(wanted, all);
  } else {
    throw Error(EINVAL, "there is no FUSE mount: name the file to show with 'mountpoint'");
  }
}

block::Handle FrontEnds::attach(const Export& wanted, const char* front_end) {
  return graph_.attach(wanted.node_name, fmt::format("{} export '{}'", front_end, wanted.name),
                       Permissions::front_end(wanted.writable));
}

void FrontEnds::publish(const Export& wanted) {
  if (wanted.nbd && nbd()) publish_nbd(wanted);
  if (wanted.fuse && !mounts_.empty()) publish_fuse(wanted, mounts());
}

void FrontEnds::publish_nbd(const Export& wanted) {
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
    nbd()->add_clone_export(wanted.name, std::move(base), std::move(maker), std::move(options));
  } else {
    nbd()->add_export(wanted.name, attach(wanted, "NBD"), std::move(options));
  }
  const std::lock_guard lock(mutex_);
  published_.push_back({{.id = wanted.id.empty() ? wanted.name + ".nbd" : wanted.id,
                         .nbd = true,
                         .node_name = wanted.node_name,
                         .name = wanted.name,
                         .writable = wanted.writable || wanted.clone.has_value()},
                        {}});
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
  const std::lock_guard lock(mutex_);
  published_.push_back({{.id = wanted.id.empty() ? wanted.name + ".fuse" : wanted.id,
                         .nbd = false,
                         .node_name = wanted.node_name,
                         .name = wanted.name,
                         .writable = wanted.writable},
                        mounts});
}

std::shared_ptr<fuse::Mount> FrontEnds::mount_at(const std::string& directory) const {
  const Mounts all = mounts();
  return base::Pool::errands().run([&]() -> std::shared_ptr<fuse::Mount> {
    const auto wanted = std::filesystem::weakly_canonical(directory);
    for (const auto& each : all) {
      if (std::filesystem::weakly_canonical(each->mountpoint()) == wanted) return each;
    }
    return nullptr;
  });
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
  const std::string directory = path.has_parent_path() ? path.parent_path().string() : ".";
  if (const auto found = mount_at(directory)) {
    publish_fuse(named, {found});
    return;
  }
  FuseMount mount{directory, {}};
  mount.options.allow_other = wanted.allow_other;
  const auto made = make_mount(mount);
  publish_fuse(named, {made});
  try {
    made->start();
  } catch (...) {
    forget(wanted.id);
    (void)made->stop(std::chrono::seconds(1));
    throw;
  }
  const std::lock_guard lock(mutex_);
  mounts_.push_back({made, true});
}

void FrontEnds::forget(const std::string& id) {
  const std::lock_guard lock(mutex_);
  std::erase_if(published_, [&](const Entry& each) { return each.what.id == id; });
}

void FrontEnds::remove(const std::string& id, bool only_unused, base::Clock::time_point deadline) {
  const std::lock_guard changing(changing_);
  Entry entry;
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(published_.begin(), published_.end(),
                                    [&](const Entry& each) { return each.what.id == id; });
    if (found == published_.end()) {
      throw Error(ENOENT, fmt::format("Export '{}' is not found", id));
    }
    entry = *found;
  }
  try {
    withdraw(entry, only_unused, deadline);
  } catch (const Error& e) {
    if (e.err() == EBUSY && only_unused) {
      throw Error(EBUSY, fmt::format("export '{}' still in use: {}; mode 'hard' cuts its users off",
                                     id, e.what()));
    }
    forget(id);
    throw;
  }
  forget(id);
  for (const auto& mount : entry.mounts) drop_mount(mount, deadline);
  if (callbacks_.export_deleted) callbacks_.export_deleted(id);
}

void FrontEnds::withdraw(const Entry& entry, bool only_unused, base::Clock::time_point deadline) {
  if (entry.what.nbd) {
    nbd()->remove_export(entry.what.name, deadline, only_unused);
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

bool FrontEnds::in_use(const std::shared_ptr<fuse::Mount>& mount) const {
  const std::lock_guard lock(mutex_);
  return std::any_of(published_.begin(), published_.end(), [&](const Entry& each) {
    return std::find(each.mounts.begin(), each.mounts.end(), mount) != each.mounts.end();
  });
}

// Once it shows nothing any more, if a command made it.
void FrontEnds::drop_mount(const std::shared_ptr<fuse::Mount>& mount,
                           base::Clock::time_point deadline) {
  if (in_use(mount)) return;
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(mounts_.begin(), mounts_.end(), [&](const OwnMount& each) {
      return each.made_here && each.mount == mount;
    });
    if (found == mounts_.end()) return;
    mounts_.erase(found);
  }
  const auto left = deadline - base::Clock::now();
  for (const std::string& line : mount->stop(std::chrono::ceil<std::chrono::milliseconds>(left))) {
    base::log_warning("{}", line);
  }
}

// --- listeners and mounts ---

void FrontEnds::open() {
  const std::lock_guard changing(changing_);
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
  const std::lock_guard changing(changing_);
  const auto there = nbd();
  const auto server = there ? there : make_nbd();
  try {
    return listen(*server, wanted, false);
  } catch (...) {
    if (!there) {
      const std::lock_guard lock(mutex_);
      nbd_.reset();
    }
    throw;
  }
}

void FrontEnds::stop_nbd(base::Clock::time_point deadline) {
  const std::lock_guard changing(changing_);
  std::shared_ptr<nbd::Server> server;
  std::vector<std::string> ids;
  {
    const std::lock_guard lock(mutex_);
    server = std::move(nbd_);
    nbd_.reset();
    for (const Entry& each : published_) {
      if (each.what.nbd) ids.push_back(each.what.id);
    }
  }
  if (!server) throw Error(ENOENT, "NBD server not running");
  const std::vector<std::string> problems = server->stop(deadline);
  for (const std::string& id : ids) {
    forget(id);
    if (callbacks_.export_deleted) callbacks_.export_deleted(id);
  }
  if (!problems.empty()) throw Error(EIO, fmt::format("{}", fmt::join(problems, "; ")));
}

// --- what there is ---

std::vector<FrontEnds::Published> FrontEnds::published() const {
  const std::lock_guard lock(mutex_);
  std::vector<Published> out;
  for (const Entry& each : published_) out.push_back(each.what);
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
