// SPDX-License-Identifier: Apache-2.0
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "tests/unit/virtio/guest.h"
#include "virtio/mmio_transport.h"
#include "virtio/rng_device.h"

namespace minivmm::virtio {
namespace {

using namespace std::chrono_literals;

class RngTest : public testing::Test {
 protected:
  void set(uint64_t offset, uint32_t value) {
    std::byte data[4];
    base::store_le(data, value);
    transport_.write(offset, data);
  }
  uint32_t get(uint64_t offset) {
    std::byte data[4];
    transport_.read(offset, data);
    return base::load_le<uint32_t>(data);
  }

  void start() {
    set(VIRTIO_MMIO_STATUS, 0);
    set(VIRTIO_MMIO_STATUS, 1);
    set(VIRTIO_MMIO_STATUS, 3);
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    set(VIRTIO_MMIO_DRIVER_FEATURES, 1);  // VERSION_1
    set(VIRTIO_MMIO_STATUS, 11);
    ASSERT_EQ(get(VIRTIO_MMIO_STATUS), 11u);
    queue_ = std::make_unique<DriverQueue>(guest_, 16, false);
    const QueueLayout& layout = queue_->layout();
    set(VIRTIO_MMIO_QUEUE_SEL, 0);
    set(VIRTIO_MMIO_QUEUE_NUM, layout.size);
    set(VIRTIO_MMIO_QUEUE_DESC_LOW, static_cast<uint32_t>(layout.descriptors));
    set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, static_cast<uint32_t>(layout.available));
    set(VIRTIO_MMIO_QUEUE_USED_LOW, static_cast<uint32_t>(layout.used));
    set(VIRTIO_MMIO_QUEUE_READY, 1);
    set(VIRTIO_MMIO_STATUS, 15);
  }

  std::optional<DriverQueue::Used> wait_for_used() {
    const auto deadline = std::chrono::steady_clock::now() + 10s;
    while (std::chrono::steady_clock::now() < deadline) {
      if (auto used = queue_->take_used()) return used;
      std::this_thread::sleep_for(1ms);
    }
    return std::nullopt;
  }
  bool wait_for_status(uint32_t bit) {
    for (int i = 0; i < 10000 && (get(VIRTIO_MMIO_STATUS) & bit) == 0; ++i) {
      std::this_thread::sleep_for(1ms);
    }
    return (get(VIRTIO_MMIO_STATUS) & bit) != 0;
  }

  std::optional<DriverQueue::Used> request(std::vector<Buffer> buffers) {
    queue_->add(buffers);
    if (queue_->publish()) set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    return wait_for_used();
  }

  TestGuest guest_;
  base::LoopGroup loops_{1};
  base::UniqueFd irq_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  RngDevice device_{guest_.memory(), loops_.loop(0), "rng0", irq_.get()};
  MmioTransport transport_{device_, device_.signals(), "rng0"};
  std::unique_ptr<DriverQueue> queue_;
};

TEST_F(RngTest, FillsBuffersAndInterrupts) {
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_ID), 4u);
  start();
  const uint64_t address = guest_.allocate(256);
  const auto used = request({{address, 100, true}, {address + 128, 100, true}});
  ASSERT_TRUE(used);
  EXPECT_EQ(used->length, 200u);
  const auto zeroes = [&](uint64_t at, uint64_t length) {
    const auto bytes = guest_.bytes(at, length);
    return std::count(bytes.begin(), bytes.end(), std::byte{0});
  };
  EXPECT_LT(zeroes(address, 100), 30) << "random bytes are hardly ever zero";
  EXPECT_LT(zeroes(address + 128, 100), 30);
  EXPECT_EQ(zeroes(address + 100, 28), 28) << "nothing outside the buffers";
  pollfd interrupt{irq_.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&interrupt, 1, 10000), 1);
  EXPECT_NE(device_.describe().find("1 requests, 200 bytes"), std::string::npos)
      << device_.describe();
}

// A guest must not make us spend time without end on one request.
TEST_F(RngTest, ARequestHasALimit) {
  start();
  const uint64_t address = guest_.allocate(1 << 20);
  const auto used = request({{address, 1 << 20, true}});
  ASSERT_TRUE(used);
  EXPECT_EQ(used->length, RngDevice::kMaxRequestBytes);
}

TEST_F(RngTest, TheLimitIsForAllBuffersOfARequest) {
  start();
  const uint64_t address = guest_.allocate(8192);
  const auto used = request({{address, 3000, true}, {address + 4096, 3000, true}});
  ASSERT_TRUE(used);
  EXPECT_EQ(used->length, RngDevice::kMaxRequestBytes);
}

TEST_F(RngTest, ARequestWithoutRoomIsAnswered) {
  start();
  const auto used = request({{guest_.allocate(64), 64, false}});
  ASSERT_TRUE(used);
  EXPECT_EQ(used->length, 0u);
}

TEST_F(RngTest, WorksAgainAfterAReset) {
  const uint64_t address = guest_.allocate(16);
  for (int i = 0; i < 50; ++i) {
    start();
    ASSERT_TRUE(request({{address, 16, true}})) << i;
  }
  set(VIRTIO_MMIO_STATUS, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_STATUS), 0u);
}

TEST_F(RngTest, ABrokenQueueNeedsAReset) {
  start();
  queue_->push_head(99);
  queue_->advance_available_index(1);
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
  EXPECT_TRUE(wait_for_status(VIRTIO_CONFIG_S_NEEDS_RESET));
  start();
  EXPECT_TRUE(request({{guest_.allocate(16), 16, true}}));
}

TEST_F(RngTest, AStoppedDeviceStaysStopped) {
  start();
  device_.stop();
  device_.stop();
  set(VIRTIO_MMIO_STATUS, 0);
  start();
  EXPECT_TRUE(wait_for_status(VIRTIO_CONFIG_S_NEEDS_RESET)) << "it says that it cannot";
}

}  // namespace
}  // namespace minivmm::virtio
