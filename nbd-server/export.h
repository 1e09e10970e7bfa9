// SPDX-License-Identifier: Apache-2.0
// What clients can open: a node under a name, and the table of them. Shared by the connections
// that use it; any thread.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/sync.h"
#include "block/graph/handle.h"
#include "nbd-server/budget.h"
#include "nbd-server/clones.h"
#include "nbd-server/server.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd {

class Export {
 public:
  // Throws EROFS where `options.writable` is asked of a handle that may not write, ENOENT and
  // EINVAL where `options.contexts` has a dirty bitmap that is not there or of no use.
  Export(std::string name, block::Handle handle, ExportOptions options);
  // One that clients get clones of: `handle` is what they are clones of, `clones` makes them.
  Export(std::string name, block::Handle handle, ExportOptions options,
         std::shared_ptr<CloneSource> clones);
  // A clone. `client`: who it is for; empty: one connection.
  Export(std::shared_ptr<Export> origin, const std::string& client, block::Handle handle);

  const std::string& name() const noexcept { return name_; }
  const std::string& description() const noexcept { return options_.description; }
  bool writable() const noexcept { return options_.writable; }
  // `client` is the name that TLS has proved; empty where it has not.
  bool allows(std::string_view client) const noexcept;
  // Whether clients may ask for a metadata context of the node.
  bool offers(std::string_view context) const noexcept;
  block::Handle& handle() noexcept { return handle_; }
  // Of a clone too, whose image may be rounded up to whole sectors.
  uint64_t size() const noexcept { return (origin_ ? origin_->handle_ : handle_).size(); }

  // Clients that use it, or are about to.
  uint64_t clients() const { return users_.inside(); }

  // What clients may do, with several connections each.
  uint16_t transmission_flags(wire::Headers headers) const noexcept;
  // The size and alignment of requests that works best: a power of two from 4096 to the maximum.
  uint32_t preferred_block() const noexcept;

  // Of a clone: what it is one of, and whose it is. Otherwise empty.
  const std::shared_ptr<Export>& origin() const noexcept { return origin_; }
  const std::string& client() const noexcept { return client_; }
  // What clients use are clones of this.
  bool cloned() const noexcept { return clones_ != nullptr; }

  // Once, before clients: a limit on what its clients hold together, if it has one.
  void limit_memory(Budgets& all);
  Budgets* memory() noexcept { return (origin_ ? origin_->memory_ : memory_).get(); }

  // "NBD export 'd': 'disk0' (qcow2, /srv/o.qcow2), 1048576 bytes, writable, 2 clients". Any time.
  std::string describe() const;
  // Fiber. Nobody new can use it from then on; false: somebody uses it still at the deadline.
  bool wait_unused(base::Clock::time_point deadline) { return users_.close_until(deadline); }
  // Fiber, once nobody uses it. Flushes and closes the handle; throws what that throws.
  void close();

  // From then on requests are refused.
  void withdraw() noexcept { withdrawn_.store(true, std::memory_order_release); }
  bool withdrawn() const noexcept {
    return (origin_ ? *origin_ : *this).withdrawn_.load(std::memory_order_acquire);
  }

 private:
  friend class ExportUse;
  friend class ExportSeat;
  void check_contexts();

  const std::string name_;
  const ExportOptions options_;
  const std::unique_ptr<Clones> clones_;
  const std::shared_ptr<Export> origin_;
  const std::string client_;
  block::Handle handle_;  // stays while somebody is inside users_
  std::unique_ptr<Budgets> memory_;
  mutable base::Gate users_;
  mutable base::Gate lookers_;  // who describes it: not for long, and no client
  std::atomic<unsigned> sessions_{0};
  std::atomic<bool> withdrawn_{false};
};

// A client's hold on an export: its handle stays open for so long. Move-only; may be empty. One of
// a clone is let go of on a fiber, because the last one closes the clone.
class ExportUse {
 public:
  ExportUse() = default;
  // Empty if the export is being closed. `client`: the name that the client gave itself.
  explicit ExportUse(std::shared_ptr<Export> target, std::string client = {});
  ExportUse(ExportUse&& other) noexcept
      : target_(std::move(other.target_)), client_(std::move(other.client_)) {}
  ExportUse& operator=(ExportUse&& other) noexcept;
  ~ExportUse() { leave(); }

  explicit operator bool() const noexcept { return target_ != nullptr; }
  Export* operator->() const noexcept { return target_.get(); }
  Export& operator*() const noexcept { return *target_; }
  const std::shared_ptr<Export>& shared() const noexcept { return target_; }

  // What the client asked for: "golden/alice".
  std::string name() const;
  // What the client may do, as the handshake tells it.
  uint16_t transmission_flags(wire::Headers headers) const noexcept;
  // Fiber. Where clients get clones: makes this a hold on this client's. Throws what that throws.
  void open_clone();

 private:
  bool of_one_connection() const noexcept;
  void leave() noexcept;
  std::shared_ptr<Export> target_;
  std::string client_;
};

// One of the places that an export has for clients. Move-only; may be empty.
class ExportSeat {
 public:
  ExportSeat() = default;
  // Empty if all are taken.
  explicit ExportSeat(const std::shared_ptr<Export>& target);
  ExportSeat(ExportSeat&& other) noexcept = default;
  ExportSeat& operator=(ExportSeat&& other) noexcept;
  ~ExportSeat() { leave(); }
  explicit operator bool() const noexcept { return target_ != nullptr; }

 private:
  void leave() noexcept;
  std::shared_ptr<Export> target_;
};

class ExportTable {
 public:
  // Throws EEXIST, EINVAL for a name or description that the protocol cannot carry, ESHUTDOWN.
  void add(std::shared_ptr<Export> added);
  // The export, or an empty use. The empty name is the export of that name, or the only one there
  // is; "golden/alice" is the client alice of the clone export "golden".
  ExportUse find(std::string_view name) const;
  std::vector<std::shared_ptr<Export>> all() const;
  // Takes it out. Nullptr if there is none. Throws EBUSY where it is to be unused and is not.
  std::shared_ptr<Export> remove(const std::string& name, bool only_unused);
  // Takes all out; add() fails from then on.
  std::vector<std::shared_ptr<Export>> close();

 private:
  ExportUse find_clone(std::string_view name) const;

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Export>, std::less<>> exports_;
  bool closed_ = false;
};

}  // namespace minivmm::nbd
