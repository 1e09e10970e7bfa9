// SPDX-License-Identifier: Apache-2.0
// The NBD server: exports by name, listeners, and the connections of clients.
//
// Owned by whoever set it up (the control plane, a test); the LoopGroup and the Graph behind the
// exports outlive it. A connection is on one loop of the group at a time and its requests run
// there as fibers. Methods marked "any thread" may be called from everywhere; the others run on a
// fiber of any loop, because they wait.
//
// Order of life: add_export, listen (either first), ..., stop. A server that is destroyed without
// stop() (unwinding) cuts its connections and does not wait: the handles go to the graph's reaper
// when the last request has ended, and the graph has to outlive that.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/loop_group.h"
#include "base/timer_queue.h"
#include "base/unique_fd.h"
#include "block/graph/handle.h"
#include "nbd-server/tls.h"

namespace minivmm::nbd {

struct ServerOptions {
  // A client that has not chosen an export by then is cut off.
  std::chrono::milliseconds handshake_limit{10'000};
  // A client with nothing in flight that is silent for this long is cut off; zero: never.
  std::chrono::milliseconds idle_limit{0};
  // Bytes of payload that are held for all clients together and for one; requests beyond wait
  // unread in the socket. Each at least the largest payload (32 MiB) and some; smaller values are
  // raised.
  uint64_t memory = uint64_t{48} << 20;
  uint64_t connection_memory = uint64_t{48} << 20;
  // A client that holds memory for this long, for replies that it does not read or data that it
  // does not send, while others wait for memory, is cut off.
  std::chrono::milliseconds stall_limit{5'000};
  // Further clients are not accepted until one leaves.
  unsigned max_connections = 4096;
  // The loops that clients share who send one request after the other (placement.h); 0: as many as
  // half the processors.
  unsigned shared_loops = 0;
  // Called when a client has left and no other is there; whether it had chosen an export. Any loop.
  std::function<void(bool entered)> on_last_left = {};
  // Where more than so many are in the handshake, the one that has been in it longest is cut off.
  unsigned max_handshakes = 256;
};

struct ExportOptions {
  std::string description;  // shown to clients; may be empty
  bool writable = false;    // needs a handle that may write
  // Who may use it, by the names that TLS has proved: a certificate's distinguished name
  // ("O=Example,CN=alice") or a key's user; "*" for everybody with one. Empty: everybody.
  std::vector<std::string> allow = {};
  // The metadata contexts that are offered beside base:allocation; all that there are, if not said.
  std::optional<std::vector<std::string>> contexts = {};
  // Several connections may be one client's (CAN_MULTI_CONN).
  bool multi_conn = true;
  // Bytes of payload that are held for its clients together, at least as ServerOptions::memory;
  // zero: what the server has.
  uint64_t memory = 0;
  // Further clients are refused while so many use it; zero: any number.
  unsigned max_connections = 0;
};

// Makes the private disks of a clone export. Shared by the server; fibers of any loop, many at
// once.
class CloneSource {
 public:
  virtual ~CloneSource() = default;
  // A disk of its own for a client, with the content and size of the export's node. `client`: the
  // name that it gave itself, or empty. Throws.
  virtual block::Handle open(const std::string& client) = 0;
  // The disk is not used any more. Throws what went wrong; the handle is closed all the same.
  virtual void close(block::Handle disk, const std::string& client) = 0;
};

struct ListenOptions {
  // "nbd://HOST[:PORT]", "nbd://[V6]:PORT", "nbd+unix:///?socket=PATH". Port 0 takes a free one.
  // An empty host is the loopback address. Ignored where `fd` is given.
  std::string uri;
  // An inherited listening socket, of any stream kind. It is taken over; it is not unlinked.
  base::UniqueFd fd;
  // Needed to listen on a TCP address beyond loopback without requiring TLS.
  bool allow_remote = false;
  TlsOptions tls = {};
  // Instead of ServerOptions'.
  std::optional<std::chrono::milliseconds> handshake_limit = {};
  std::optional<std::chrono::milliseconds> idle_limit = {};
  // Further clients of this listener are not accepted while it has so many; zero: any number.
  unsigned max_connections = 0;
  // Further connections of one client (an address, or a user of this host) are closed at once while
  // it has so many; zero: any number.
  unsigned max_per_client = 0;
};

class Server {
 public:
  explicit Server(base::LoopGroup& loops, ServerOptions options = {});
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;
  ~Server();

  // Publishes a node. Any thread. Throws EEXIST if the name is taken, EINVAL for a name that the
  // protocol cannot carry (over 4096 bytes, NUL), EROFS if `writable` is asked of a handle that
  // is not, ENOENT and EINVAL for a dirty bitmap in `contexts` that is not there or inconsistent,
  // ESHUTDOWN after stop(). Then the handle is destroyed (see Handle).
  void add_export(std::string name, block::Handle handle, ExportOptions options = {});

  // Publishes a node that each client gets its own disk of, which it may write to: each connection,
  // or, where a client asks for NAME/CLIENT, all connections that ask for that. `base` is held for
  // as long as the export is there. Any thread. Throws as add_export.
  void add_clone_export(std::string name, block::Handle base, std::shared_ptr<CloneSource> clones,
                        ExportOptions options = {});

  // Withdraws an export: its clients' further requests fail with ESHUTDOWN, those in flight are
  // finished until the deadline, then the clients are cut off and the handle is closed. Throws
  // ENOENT; ETIMEDOUT naming what still runs, whose end then closes the handle; or what closing
  // threw. The name is free again all the same. `only_unused`: throws EBUSY instead where a client
  // uses it, and nothing has changed.
  void remove_export(const std::string& name, base::Clock::time_point deadline,
                     bool only_unused = false);

  // Starts a listener. Clients can connect when it returns. Returns its address as a URI, ready to
  // paste (the port filled in). Throws base::Error: EADDRINUSE names a live socket's path; a
  // busy address and a dead process's socket are tried for about two seconds.
  std::string listen(ListenOptions options);

  // Serves one connected stream socket (inetd style, tests). Any thread.
  void serve(base::UniqueFd connected);

  // The addresses, one a listener and export: "nbd+unix:///disk0?socket=/run/m.sock". Any thread.
  std::vector<std::string> uris() const;

  // Ends service: accepts no more, lets requests in flight finish until the deadline, cuts what is
  // left, closes the exports. Returns a line for each thing that did not end well: a client
  // whose requests were still running, an export whose last flush failed or hangs. Later calls
  // return an empty list.
  std::vector<std::string> stop(base::Clock::time_point deadline);

  // Live state, a line each: listeners, exports, clients and what they have in flight. Any thread.
  std::vector<std::string> describe() const;

  class Core;

 private:
  std::shared_ptr<Core> core_;
};

}  // namespace minivmm::nbd
