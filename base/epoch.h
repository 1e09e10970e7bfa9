// SPDX-License-Identifier: Apache-2.0
// Counts requests in flight, per loop, and waits for those that began before a moment.
//
// A request holds a Pin while it runs. synchronize() returns once every Pin that existed when it
// was called is gone; Pins taken later do not delay it. That is how a host cluster that was freed
// is known to have no older I/O on its way to it, and how a drain knows that it is done. enter and
// leave touch cache lines of the loop's own.
//
// An epoch may be destroyed as soon as nothing is in flight. A Pin is released on the loop that
// took it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/timer_queue.h"
#include "base/wait_queue.h"

namespace minivmm::base {

class Epoch {
 public:
  Epoch();
  Epoch(const Epoch&) = delete;
  Epoch& operator=(const Epoch&) = delete;
  ~Epoch();

  class Pin {
   public:
    Pin() = default;
    explicit Pin(Epoch& epoch) noexcept : epoch_(&epoch), slot_(epoch.enter()) {}
    Pin(Pin&& o) noexcept : epoch_(o.epoch_), slot_(o.slot_) { o.epoch_ = nullptr; }
    Pin& operator=(Pin&& o) noexcept;
    ~Pin() { release(); }
    explicit operator bool() const noexcept { return epoch_ != nullptr; }
    void release() noexcept {
      if (epoch_ != nullptr) epoch_->leave(slot_);
      epoch_ = nullptr;
    }

   private:
    Epoch* epoch_ = nullptr;
    uint32_t slot_ = 0;
  };

  // Fiber; must hold no Pin of this epoch itself.
  void synchronize();
  // The same with an end, also where another call waits without one; false: some are still in
  // flight.
  bool synchronize_until(Clock::time_point deadline);

  // How many are in flight; exact only when nobody enters or leaves.
  uint64_t in_flight() const noexcept;

 private:
  struct Counters;
  uint32_t enter() noexcept;
  void leave(uint32_t slot) noexcept;
  uint64_t count(unsigned phase) const noexcept;
  bool wait(std::unique_lock<std::mutex>& lock, WaitQueue& queue, Clock::time_point deadline);
  bool wait_for_phase(std::unique_lock<std::mutex>& lock, unsigned phase,
                      Clock::time_point deadline);
  bool wait_for_older(std::unique_lock<std::mutex>& lock, Clock::time_point deadline);

  std::unique_ptr<Counters[]> counters_;
  std::atomic<uint32_t> phase_{0};
  std::atomic<bool> waiting_{false};
  std::mutex mutex_;
  bool synchronizing_ = false;   // one at a time; flips phase_. Guarded by mutex_
  bool old_phase_busy_ = false;  // a timed-out synchronize left pins in the other phase
  WaitQueue turns_;              // for synchronizing_
  WaitQueue drained_;
};

}  // namespace minivmm::base
