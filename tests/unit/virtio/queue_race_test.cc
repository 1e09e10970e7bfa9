// SPDX-License-Identifier: Apache-2.0
// Both sides of a queue at the same moment: each stores what the other looks at, and then looks at
// what the other stores. Without a full fence between the two both can miss each other, and then
// both sleep for ever: a guest that hangs once a day.
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include <gtest/gtest.h>

#include "base/unique_fd.h"
#include "tests/unit/virtio/guest.h"
#include "virtio/queue.h"
#include "virtio/signals.h"

namespace minivmm::virtio {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint16_t kSize = 8;
constexpr unsigned kRounds = 200'000;
// For all of them, since a machine with one free processor needs much longer for each.
constexpr std::chrono::milliseconds kEnough{300};
constexpr std::chrono::seconds kLost{20};

class QueueRaceTest : public testing::Test {
 protected:
  QueueRaceTest()
      : driver_(guest_, kSize, true),
        queue_(guest_.memory(), driver_.layout(), {.event_index = true}, kSize) {}

  std::atomic_ref<uint16_t> shared(uint64_t address) {
    // SAFETY: 2-aligned, inside guest memory, and accessed by atomics alone meanwhile.
    return std::atomic_ref(*reinterpret_cast<uint16_t*>(guest_.at(address, 2)));
  }

  // Spins, without keeping the other side from running where there is one processor. False: the
  // test is over, or what is waited for does not come.
  template <typename Done>
  bool until(Done done) const {
    Clock::time_point limit = Clock::time_point::max();
    for (unsigned turns = 0; !done(); ++turns) {
      if (over_.load()) return false;
      if (turns < 2000) continue;
      std::this_thread::yield();
      if (turns == 2000) limit = Clock::now() + kLost;
      if (Clock::now() > limit) return false;
    }
    return true;
  }
  // The two sides meet at the very moment only now and then: a wait of another length each round.
  static void dither(unsigned round) {
    for (unsigned left = round % 128; left != 0; --left) {
      std::atomic_signal_fence(std::memory_order_seq_cst);  // keeps the loop
    }
  }
  bool enough(unsigned rounds) const {
    return rounds == kRounds || (rounds % 64 == 0 && Clock::now() - begin_ > kEnough);
  }

  TestGuest guest_;
  DriverQueue driver_;
  Queue queue_;
  std::atomic<bool> over_{false};
  const Clock::time_point begin_ = Clock::now();
};

TEST_F(QueueRaceTest, NoInterruptIsLost) {
  std::atomic<unsigned> interrupts{0};
  std::atomic<unsigned> taken{0};
  std::thread device([&] {
    for (unsigned i = 0; i < kRounds; ++i) {
      queue_.push_used(0, 0);
      if (queue_.publish()) interrupts.fetch_add(1);
      if (!until([&] { return taken.load(std::memory_order_acquire) > i; })) return;
    }
  });
  const auto index = shared(driver_.layout().used + 2);
  const auto event = shared(driver_.layout().available + 4 + kSize * 2);
  bool lost = false;
  for (unsigned i = 0, seen = 0; !lost && !enough(i); ++i) {
    dither(i);
    event.store(static_cast<uint16_t>(i), std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    // "Asleep" only an interrupt counts.
    const bool sleeps = index.load(std::memory_order_acquire) == static_cast<uint16_t>(i);
    lost = sleeps && !until([&] { return interrupts.load() > seen; });
    seen = interrupts.load();
    lost = lost || !until([&] { return index.load() != static_cast<uint16_t>(i); });
    taken.store(i + 1, std::memory_order_release);
  }
  over_.store(true);
  device.join();
  EXPECT_FALSE(lost) << "nobody told the driver of a request";
}

TEST_F(QueueRaceTest, NoNotificationIsLost) {
  std::atomic<unsigned> notifications{0};
  std::atomic<unsigned> served{0};
  const auto index = shared(driver_.layout().available + 2);
  const auto event = shared(driver_.layout().used + 4 + kSize * 8);
  guest_.store<uint64_t>(driver_.layout().descriptors, driver_.layout().descriptors);
  guest_.store<uint32_t>(driver_.layout().descriptors + 8, 16);
  std::thread driver([&] {
    for (unsigned i = 0; i < kRounds; ++i) {
      index.store(static_cast<uint16_t>(i + 1), std::memory_order_release);
      std::atomic_thread_fence(std::memory_order_seq_cst);
      const uint16_t wanted = event.load(std::memory_order_relaxed);
      if (index_passed(wanted, static_cast<uint16_t>(i + 1), static_cast<uint16_t>(i))) {
        notifications.fetch_add(1);
      }
      if (!until([&] { return served.load(std::memory_order_acquire) > i; })) return;
    }
  });
  iovec segments[kSize];
  Chain chain;
  bool lost = false;
  for (unsigned i = 0, seen = 0; !lost && !enough(i); ++i) {
    dither(i);
    const bool sleeps = queue_.enable_notifications();
    lost = sleeps && !until([&] { return notifications.load() > seen; });
    seen = notifications.load();
    lost = lost || !until([&] { return queue_.has_available(); });
    lost = lost || queue_.pop(segments, chain) != Queue::Pop::kChain;
    served.store(i + 1, std::memory_order_release);
  }
  over_.store(true);
  driver.join();
  EXPECT_FALSE(lost) << "nobody told the device of a request";
}

// The driver's handler may run before the write of the eventfd returns: without a cause it says
// that the interrupt was not for it. Here that write cannot return until the test lets it.
TEST(Signals, TheCauseStandsBeforeTheInterrupt) {
  const base::UniqueFd irq(::eventfd(0, EFD_CLOEXEC));
  ASSERT_TRUE(irq);
  const uint64_t full = UINT64_MAX - 1;
  ASSERT_EQ(::write(irq.get(), &full, sizeof full), ssize_t{sizeof full});
  Signals signals(irq.get());
  std::thread device([&] { signals.used_buffers(); });
  const auto limit = Clock::now() + std::chrono::seconds(5);
  while (signals.interrupt_status() == 0 && Clock::now() < limit) std::this_thread::yield();
  EXPECT_EQ(signals.interrupt_status(), uint32_t{VIRTIO_MMIO_INT_VRING});
  uint64_t count = 0;
  ASSERT_EQ(::read(irq.get(), &count, sizeof count), ssize_t{sizeof count});
  device.join();
}

}  // namespace
}  // namespace minivmm::virtio
