// SPDX-License-Identifier: Apache-2.0
// A block device with a driver: what a guest's kernel does, in plain memory and on the test's
// thread.
#pragma once

#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <string_view>

#include <chrono>
#include <memory>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "block/graph/graph.h"
#include "tests/unit/virtio/guest.h"
#include "tests/unit/virtio/test_node.h"
#include "virtio/mmio_block.h"

namespace minivmm::virtio {

constexpr uint32_t kDriverOk = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                               VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

// A request as the driver remembers it.
struct Pending {
  uint16_t queue = 0;
  uint16_t head = 0;
  uint64_t status = 0;  // guest addresses
  uint64_t data = 0;
  uint32_t bytes = 0;
};

class BlockTest : public testing::Test {
 protected:
  static constexpr uint64_t kDiskBytes = 4 << 20;
  static constexpr uint8_t kUnanswered = 0xee;

  explicit BlockTest(base::BackendChoice backend = base::BackendChoice::kAuto);
  ~BlockTest() override;

  // Makes the disk and the device. `options.name` and the loops are the fixture's.
  void make(BlockOptions options = {}, std::shared_ptr<TestNode> node = nullptr);
  // Ends it; EXPECTs that it went idle.
  void stop();

  // Registers.
  uint32_t get(uint64_t offset);
  void set(uint64_t offset, uint32_t value);
  template <typename T>
  T config(size_t offset);
  uint32_t status() { return get(VIRTIO_MMIO_STATUS); }
  uint64_t offered();

  // From reset to DRIVER_OK with these features (and VERSION_1), all queues, of the offered size
  // or `queue_size`. Fails the test if the device refuses.
  void start(uint64_t features, uint16_t queue_size = 0);
  void start() { start(offered()); }
  void reset() { set(VIRTIO_MMIO_STATUS, 0); }

  // Requests. add_* only chain; kick() makes them visible and notifies if asked to.
  Pending add(uint32_t type, uint64_t sector, std::span<const Buffer> data, uint16_t queue = 0,
              bool indirect = false);
  Pending add_read(uint64_t sector, uint32_t bytes, uint16_t queue = 0);
  Pending add_write(uint64_t sector, std::span<const std::byte> data, uint16_t queue = 0);
  void kick(uint16_t queue = 0);
  // Waits until the request is used, taking others on the way; returns its status byte.
  uint8_t wait(const Pending& request);
  // Every request of the queue that is used by now, or comes within 5 s until `count` are.
  unsigned take_used(unsigned count, uint16_t queue = 0);
  uint8_t status_of(const Pending& request) { return guest_.load<uint8_t>(request.status); }

  // One request from start to end.
  uint8_t run(uint32_t type, uint64_t sector = 0, std::span<const Buffer> data = {});
  uint8_t read(uint64_t sector, std::span<std::byte> to);
  uint8_t write(uint64_t sector, std::span<const std::byte> from);
  uint8_t flush() { return run(VIRTIO_BLK_T_FLUSH); }

  // Waits for an interrupt; false after `timeout`. Acknowledges its causes and returns them.
  uint32_t wait_interrupt(std::chrono::milliseconds timeout = std::chrono::seconds(5));
  // Edges so far that nobody has waited for.
  uint64_t take_interrupts();
  // Waits until `done()`; fails the test after 5 s.
  template <typename Done>
  void eventually(Done done, std::string_view what);

  template <typename Body>
  auto on_fiber(Body&& body) {
    return loops_.loop(0).call("test", std::forward<Body>(body));
  }

  base::LoopGroup loops_;
  block::Graph graph_;
  TestGuest guest_;
  base::UniqueFd irq_;
  std::shared_ptr<TestNode> node_;
  std::unique_ptr<MmioBlock> device_;
  std::vector<std::unique_ptr<DriverQueue>> queues_;
  std::vector<std::vector<bool>> used_;  // by queue and head: used since it was added
  std::vector<DriverQueue::Used> last_used_;
};

std::vector<std::byte> pattern(size_t bytes, uint8_t seed);

// 32 random bits a call.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  uint32_t operator()() { return static_cast<uint32_t>(engine_()); }

 private:
  std::mt19937 engine_;
};

constexpr uint64_t feature(unsigned bit) { return uint64_t{1} << bit; }

template <typename T>
T BlockTest::config(size_t offset) {
  T value{};
  device_->read(VIRTIO_MMIO_CONFIG + offset,
                std::as_writable_bytes(std::span<T>(&value, size_t{1})));
  return value;
}

template <typename Done>
void BlockTest::eventually(Done done, std::string_view what) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) {
      ADD_FAILURE() << "after 5 s still not: " << what;
      return;
    }
    ::usleep(100);
  }
}

}  // namespace minivmm::virtio
