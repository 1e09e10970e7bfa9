// SPDX-License-Identifier: Apache-2.0
// The NBD server and the FUSE mounts of a daemon, and what is published through them: by the
// command line at the start, and by the control socket while clients come and go.
//
// Owned by the daemon; loops and graph outlive it. Methods run on fibers, unless they say
// otherwise. An export that comes or goes may wait for its clients; others do not wait for it.
#pragma once

#include <string>

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "base/loop_group.h"
#include "base/sync.h"
#include "base/wait_queue.h"
#include "block/graph/graph.h"
#include "control/config.h"
#include "fuse/mount.h"
#include "nbd-server/server.h"

namespace minivmm::control {

class FrontEnds {
 public:
  // Each is called on a fiber of any loop and must not wait; may be empty.
  struct Callbacks {
    std::function<void()> last_client_left;  // and nobody else can come, or --once
    std::function<void()> unmounted;         // a mount, by somebody else
    std::function<void(const std::string& id)> export_deleted;
  };
  FrontEnds(base::LoopGroup& loops, block::Graph& graph, const Config& config, Callbacks callbacks);
  FrontEnds(const FrontEnds&) = delete;
  FrontEnds& operator=(const FrontEnds&) = delete;

  // Shows what the configuration exports, then opens its mounts and listeners. Once, in this order.
  void publish_configured();
  void open();

  // Publishes through one front end: NBD, or FUSE, where `wanted.file` is the path at which the
  // file is to be seen; in a directory that no mount of ours has a new one is made, which goes with
  // its last file. Throws EEXIST for an id or name that is taken (an id is until its export has
  // gone), EINVAL, what attaching throws.
  void add(const Export& wanted);
  // Withdraws one. `only_unused`: throws EBUSY where a client uses it, or has it open; otherwise
  // requests in flight get until the deadline, and then clients are cut off. Throws ENOENT; EBUSY
  // where somebody else withdraws it; ETIMEDOUT, or what flushing threw: it is withdrawn then all
  // the same.
  void remove(const std::string& id, bool only_unused, base::Clock::time_point deadline);

  // Another listener of NBD; the first makes the server. Returns its URI.
  std::string start_nbd(const NbdListener& wanted);
  // Ends all listeners and connections of NBD and withdraws its exports. Throws ENOENT where there
  // is no server; what did not end well.
  void stop_nbd(base::Clock::time_point deadline);

  struct Published {
    std::string id;
    bool nbd = false;  // else a FUSE file
    std::string node_name;
    std::string name;
    bool writable = false;
    bool going = false;  // is being withdrawn
  };
  // Any thread.
  std::vector<Published> published() const;
  std::vector<std::string> uris() const;
  std::vector<std::string> mountpoints() const;
  // The live state, a line each. Any thread.
  std::vector<std::string> describe() const;

  // Everything at once, each part on a thread of its own (run_side_by_side); appends what did not
  // end well. Once, last. Not on a fiber.
  using Report = std::function<void(std::vector<std::string>)>;
  void add_stops(std::vector<std::function<void()>>& parts, std::chrono::milliseconds limit,
                 const Report& report);

 private:
  using Mounts = std::vector<std::shared_ptr<fuse::Mount>>;
  // Who comes or goes is its command's alone: nobody else changes it.
  enum class Stage { kComing, kThere, kGoing };
  struct Entry {
    Published what;
    Stage stage = Stage::kComing;
    std::shared_ptr<nbd::Server> server;  // of an NBD export
    Mounts mounts;                        // of a FUSE file
  };
  // `made_here`: by a command, and goes with its last file.
  struct OwnMount {
    std::shared_ptr<fuse::Mount> mount;
    std::string place;  // its directory, without symbolic links
    bool made_here = false;
    Stage stage = Stage::kThere;
  };
  std::shared_ptr<nbd::Server> make_nbd();
  static Published description_of(const Export& wanted, bool nbd);
  void publish(const Export& wanted);
  void publish_nbd(const Export& wanted, nbd::Server& server);
  void publish_fuse(const Export& wanted, const Mounts& mounts);
  void publish_file(const Export& wanted);
  std::shared_ptr<nbd::Server> begin_adding(const Export& wanted);
  void end_adding(const std::string& id);
  Entry begin_removing(const std::string& id);
  bool stay(const std::string& id);
  std::shared_ptr<fuse::Mount> make_mount(const FuseMount& wanted);
  Mounts claim_mounts(const std::string& id);
  std::pair<std::shared_ptr<fuse::Mount>, bool> claim_mount(const std::string& id,
                                                            const FuseMount& wanted);
  void withdraw(const Entry& entry, bool only_unused, base::Clock::time_point deadline);
  void drop_mount(const std::shared_ptr<fuse::Mount>& mount, base::Clock::time_point deadline);
  Entry* find(const std::string& id);
  Mounts forget(const std::string& id);
  Mounts mounts() const;
  block::Handle attach(const Export& wanted, const char* front_end);
  bool serve_connected(const NbdListener& wanted);
  std::string listen(nbd::Server& server, const NbdListener& wanted, bool warn);
  std::shared_ptr<nbd::Server> nbd() const;

  base::LoopGroup& loops_;
  block::Graph& graph_;
  const Config& config_;
  const Callbacks callbacks_;
  base::FiberMutex serving_;  // held while the NBD server, or a listener of it, comes or goes

  mutable std::mutex mutex_;  // guards what follows; not held while anything is done with it
  base::WaitQueue mounts_changed_;
  std::shared_ptr<nbd::Server> nbd_;
  std::vector<OwnMount> mounts_;
  std::vector<Entry> published_;
};

}  // namespace minivmm::control
