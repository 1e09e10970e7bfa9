// SPDX-License-Identifier: Apache-2.0
// What a run of the daemon consists of: plain data, made from the command line, checked there.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "base/event_loop.h"
#include "block/graph/open_policy.h"
#include "block/graph/options.h"
#include "fuse/mount.h"
#include "nbd-server/tls.h"
#include "virtio/block_options.h"

namespace minivmm::control {

// The guest's device on a node.
struct DiskDevice {
  std::string serial;
  uint32_t logical_block_size = 512;
  uint32_t physical_block_size = 0;
  uint16_t num_queues = 1;
  uint16_t queue_size = 256;
  virtio::ErrorAction read_error = virtio::ErrorAction::kReport;
  virtio::ErrorAction write_error = virtio::ErrorAction::kReport;
  bool indirect = true;
  bool event_index = true;
  bool legacy = false;
};

// `--disk`: a node and, in a machine, its device.
struct Disk {
  block::Options node;  // with its node-name
  std::string node_name;
  bool read_only = false;
  bool snapshot = false;  // writes go to a file that is gone at the end
  DiskDevice device;
  std::string notice;  // what the user should know, such as that the format was guessed
};

// `--export NODE,clone[=memory|qcow2]`: the disks that clients write to.
struct CloneOptions {
  bool in_memory = true;
  uint64_t limit = UINT64_MAX;  // bytes that one may hold
  uint64_t total = UINT64_MAX;  // bytes that all in use may hold
  std::string directory;        // where those of clients with a name are kept; empty: nowhere
};

// `--export NODE[,name=N][,writable][,nbd][,fuse][,clone]`.
struct Export {
  std::string id;  // for the control socket; empty: NAME.nbd, NAME.fuse
  std::string node_name;
  std::string name;
  std::string description;
  std::vector<std::string> allow;  // of NBD clients with TLS; empty: all
  // Metadata contexts for NBD clients beside base:allocation; all, if not said.
  std::optional<std::vector<std::string>> contexts = {};
  uint64_t in_flight = 0;        // bytes, of NBD clients; 0: what the server has
  unsigned max_connections = 0;  // of NBD clients; 0: any number
  bool writable = false;
  bool nbd = false;
  bool fuse = false;
  bool every_front_end = false;  // none was named: those that are open
  std::string file;              // of a command: where FUSE is to show it
  bool allow_other = false;      // of a mount that is made for that
  std::optional<CloneOptions> clone;
};

// `--nbd URI[,tls-creds=ID][,tls=required|optional][,idle-timeout=..][...]`, or an inherited
// socket.
struct NbdListener {
  std::string uri;
  int fd = -1;         // a listening socket, or a connected one, of which the client is served
  bool stdio = false;  // standard input is a connected socket
  nbd::TlsOptions tls = {};
  std::optional<std::chrono::milliseconds> handshake_timeout = {};
  std::optional<std::chrono::milliseconds> idle_timeout = {};
  unsigned max_connections = 0;
  unsigned max_per_client = 0;
};

// `--fuse DIR[,mode=..][,uid=..][,gid=..][,allow_other]`.
struct FuseMount {
  std::string directory;
  fuse::MountOptions options;
};

struct Boot {
  std::string kernel;  // empty: the first disk's own, or without one the embedded probe guest
  bool probe = false;  // the probe guest, whatever is on the disk
  std::string initrd;
  std::string append;
  uint64_t memory_bytes = uint64_t{256} << 20;
  bool shared_memory = false;
  bool prealloc = false;
  uint64_t huge_page_bytes = 0;  // RAM in huge pages of this size; 0: transparent ones
  unsigned cpus = 1;
  std::string devices = "auto";  // how the kernel is told of them: auto, acpi, command-line
  bool rng = true;
  bool restart_on_reboot = false;  // else a reset by the guest ends the machine
  // By the name of a thread (vcpu0, io1): the processors it may run on.
  std::map<std::string, std::vector<unsigned>> processors;
  std::string serial = "stdio";  // stdio, none, pty, file:PATH, or unix:PATH
};

struct Config {
  unsigned io_threads = 1;
  base::BackendChoice io_backend = base::BackendChoice::kAuto;
  block::OpenPolicy open_policy;
  std::vector<block::Options> blockdevs;
  std::vector<Disk> disks;
  std::vector<Export> exports;
  std::vector<NbdListener> nbd;
  bool nbd_allow_remote = false;
  unsigned nbd_clients = 0;  // connections at once; 0: the server's own bound
  bool once = false;         // end when the last NBD client has left
  std::vector<FuseMount> fuse;
  std::optional<Boot> boot;
  // Filters of system calls for threads that guests and clients talk to.
  bool confine_threads = true;
  int ready_fd = -1;
  std::string pid_file;
  std::string control_socket;  // a path; empty: none
  std::chrono::milliseconds shutdown_timeout{10'000};
};

}  // namespace minivmm::control
