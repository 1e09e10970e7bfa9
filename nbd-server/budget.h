// SPDX-License-Identifier: Apache-2.0
// Bytes of payload that may be held for clients: Budgets for all of them, others below those for
// the clients of an export where that is limited, an Account for each client.
//
// Memory for a request is admitted before it is spent; a request that is not admitted stays in the
// client's socket. Waiting is first come, first served, so that a large request is not starved; a
// share is kept for small ones, who have a queue of their own. What connections cost beside their
// requests is set aside: the more there are, the less is open to requests.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/cancel.h"

namespace minivmm::base {
class Fiber;
}

namespace minivmm::nbd {

// The largest request must fit, beside what others may keep (see Budget::try_acquire_spare) and
// what small requests have to themselves (see Budgets).
inline constexpr uint64_t kMinClientMemory = (uint64_t{32} << 20) + (uint64_t{1} << 20);
inline constexpr uint64_t kMinMemory = kMinClientMemory / 3 * 4 / 15 * 16;

// Any loop.
class Budget {
 public:
  // What is acquired of this is acquired of `above` too, which outlives it.
  explicit Budget(uint64_t bytes, Budget* above = nullptr) noexcept
      : total_(bytes), above_(above) {}
  Budget(const Budget&) = delete;
  Budget& operator=(const Budget&) = delete;

  uint64_t total() const noexcept { return total_; }
  uint64_t used() const noexcept;
  // What is free here and above beyond the quarter that is left for who holds nothing.
  uint64_t spare() const noexcept;
  bool try_acquire(uint64_t bytes) noexcept;
  // Only while three quarters of what is open stay free: for what is pleasant to have. It may be
  // kept over waits, because what the largest request needs can still come free.
  bool try_acquire_spare(uint64_t bytes) noexcept;
  // Fiber. `bytes` must not exceed total(). False: cancelled, and nothing was acquired.
  bool acquire(uint64_t bytes, base::CancelSource& cancel);
  void release(uint64_t bytes) noexcept;
  // Leaves `bytes` less open to requests, but a quarter of all: there is no bound on what is set
  // aside. A request that does not fit into what is open still gets its turn, when no more than a
  // quarter is in use.
  void set_aside(uint64_t bytes) noexcept;
  void put_back(uint64_t bytes) noexcept;
  uint64_t set_aside() const noexcept;
  // True while somebody waits.
  bool contended() const noexcept {
    return waiting_.load(std::memory_order_relaxed) != 0 ||
           (above_ != nullptr && above_->contended());
  }

 private:
  struct Waiter;
  void unlink(Waiter& waiter) noexcept;
  uint64_t open() const noexcept;
  bool fits(uint64_t bytes) const noexcept;
  bool try_acquire_own(uint64_t bytes) noexcept;
  bool try_acquire_spare_own(uint64_t bytes) noexcept;
  bool acquire_own(uint64_t bytes, base::CancelSource& cancel);
  void release_own(uint64_t bytes) noexcept;
  void grant() noexcept;

  const uint64_t total_;
  Budget* const above_;
  mutable std::mutex mutex_;
  uint64_t used_ = 0;       // guarded by mutex_
  uint64_t aside_ = 0;      // guarded by mutex_
  Waiter* head_ = nullptr;  // guarded by mutex_, oldest first
  Waiter* tail_ = nullptr;  // guarded by mutex_
  std::atomic<unsigned> waiting_{0};
};

// What a server or an export has. Clients that ask for much and read slowly can hold all that is
// open to everybody, and the queue for it is long then; who asks for little is served out of a
// share that they cannot get at. Any loop.
class Budgets {
 public:
  // Up to 64 KiB of payload and what a request costs beside it.
  static constexpr uint64_t kSmall = uint64_t{80} << 10;

  explicit Budgets(uint64_t bytes, Budgets* above = nullptr) noexcept
      : open_(bytes - bytes / 16, above != nullptr ? &above->open_ : nullptr),
        kept_(bytes / 16, above != nullptr ? &above->kept_ : nullptr) {}

  // For every request; the largest fits.
  Budget& open() noexcept { return open_; }
  // For requests of at most kSmall, where nothing is open.
  Budget& kept() noexcept { return kept_; }

  uint64_t total() const noexcept { return open_.total() + kept_.total(); }
  uint64_t used() const noexcept { return open_.used() + kept_.used(); }
  uint64_t set_aside() const noexcept { return open_.set_aside(); }
  bool contended() const noexcept { return open_.contended() || kept_.contended(); }

 private:
  Budget open_;
  Budget kept_;
};

// What a connection costs while it lives, set aside. Any loop.
class ConnectionCost {
 public:
  // Socket and stack, what a session consists of, and requests that wait to be admitted.
  static constexpr uint64_t kPlain = uint64_t{24} << 10;
  // With TLS: its keys, and records that are not complete or not sent.
  static constexpr uint64_t kTls = uint64_t{56} << 10;

  explicit ConnectionCost(Budgets& budgets) noexcept : budgets_(budgets) { set(kPlain); }
  ConnectionCost(const ConnectionCost&) = delete;
  ConnectionCost& operator=(const ConnectionCost&) = delete;
  ~ConnectionCost() { set(0); }

  void set(uint64_t bytes) noexcept {
    budgets_.open().put_back(bytes_);
    budgets_.open().set_aside(bytes);
    bytes_ = bytes;
  }

 private:
  Budgets& budgets_;
  uint64_t bytes_ = 0;
};

// One client's part, on the client's loop. Takes from the budgets in larger steps than a request
// and gives back when nothing is in use, so that small requests rarely touch what loops share.
class Account {
 public:
  Account(Budgets& budgets, uint64_t limit) noexcept : budgets_(budgets), limit_(limit) {}
  Account(const Account&) = delete;
  Account& operator=(const Account&) = delete;
  ~Account() { settle(); }

  // True if `bytes` are this client's now; `bytes` must not exceed the limit.
  bool try_take(uint64_t bytes) noexcept;
  // True if only the shared budgets stand in the way: then wait() for them rather than for one's
  // own requests to end.
  bool within_limit(uint64_t bytes) const noexcept { return used_ + bytes <= limit_; }
  // Fiber. Takes `bytes`, within the limit, when the shared budgets have them. False: cancelled.
  bool wait(uint64_t bytes, base::CancelSource& cancel);
  void give_back(uint64_t bytes) noexcept {
    used_ -= bytes;
    if (eager_) settle();
  }
  // Returns what is not in use to the budgets.
  void settle() noexcept;
  // While the client's fiber waits for whatever reason, nothing that is not in use may be kept:
  // others may wait for it.
  void set_eager(bool eager) noexcept {
    eager_ = eager;
    if (eager) settle();
  }

  uint64_t used() const noexcept { return used_; }
  Budgets& budgets() const noexcept { return budgets_; }

 private:
  static constexpr uint64_t kStep = uint64_t{256} << 10;

  Budgets& budgets_;
  const uint64_t limit_;
  uint64_t used_ = 0;
  uint64_t leased_ = 0;     // taken from the budgets; at least used_
  uint64_t from_kept_ = 0;  // of these, out of the kept share
  bool eager_ = false;
};

}  // namespace minivmm::nbd
