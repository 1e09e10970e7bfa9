// SPDX-License-Identifier: Apache-2.0
// The connections of one NBD disk: picks one for a command, makes more where the server allows it,
// and makes new ones when the server went away.
//
// One connection that breaks takes the others with it: the server is taken to have ended. Commands
// that were in flight are sent again on the next connection, after what was acknowledged and not
// flushed (unflushed.h), until the reconnect delay has passed since the loss; then they fail, until
// the server is back.
//
// Shared by the node and by the fibers that connect. Any loop.
#pragma once

#include <string>

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "base/sync.h"
#include "base/wait_queue.h"
#include "block/protocols/nbd/link.h"
#include "block/protocols/nbd/target.h"
#include "block/protocols/nbd/unflushed.h"

namespace minivmm::block {

class NbdPool : public std::enable_shared_from_this<NbdPool> {
 public:
  explicit NbdPool(NbdTarget target) : target_(std::move(target)) {}

  // Fiber. The first connection. Throws why there is none.
  void open();
  // What the server said then; later connections must say the same.
  const NbdExport& info() const noexcept { return info_; }
  const NbdTarget& target() const noexcept { return target_; }

  // Fiber. Runs the command. 0 or the errno value of the server's answer; throws EIO where the
  // server is away for longer than it is waited for.
  int run(NbdCommand& command);

  // Whether what ends is to be kept in unflushed().
  bool keeps_unflushed() const noexcept {
    return target_.reconnect_delay.count() > 0 && info_.flush;
  }
  UnflushedLog& unflushed() noexcept { return unflushed_; }

  // Fiber. From then on a server that answers nothing, or is away, is waited for no longer than the
  // target's closing timeout: then requests fail. Does not wait.
  void limit_waits() noexcept;
  // Fiber. Nothing is waited for any more: what is in flight fails, and what comes, which includes
  // open(). Does not wait.
  void give_up(const std::string& why);
  // Fiber, once nothing is in flight. Ends every connection.
  void close();

  unsigned connections() const;
  uint64_t reconnects() const noexcept { return reconnects_.load(std::memory_order_relaxed); }

 private:
  using Link = std::shared_ptr<NbdLink>;

  Link use();
  Link pick(base::EventLoop& loop);
  void grow(base::EventLoop& loop);
  void watch(NbdLink& link);
  void lost(const Link& link);
  void reconnect(const std::vector<Link>& before);
  bool try_again();
  void check_same(const NbdExport& now) const;
  void do_unflushed_again(const Link& link);
  void watch_silence();
  void cut_all(std::string why) noexcept;

  const NbdTarget target_;
  NbdExport info_;
  UnflushedLog unflushed_;
  std::atomic<bool> closing_{false};
  std::atomic<uint64_t> reconnects_{0};
  std::atomic<bool> limited_{false};
  base::WaitGroup fibers_;  // that connect, or watch

  mutable std::mutex mutex_;
  base::WaitQueue changed_;
  std::vector<Link> links_;             // guarded by mutex_; empty: the server is away
  std::set<base::EventLoop*> growing_;  // guarded by mutex_; loops that are not to be grown for
  Link repeated_;                       // guarded by mutex_; gets the unflushed writes again
  std::vector<Link> given_up_;          // guarded by mutex_
  unsigned held_ = 0;                   // guarded by mutex_; requests that wait for a server
  base::Clock::time_point lost_at_{};   // guarded by mutex_
  std::string why_;                     // guarded by mutex_; the last attempt's error
};

}  // namespace minivmm::block
