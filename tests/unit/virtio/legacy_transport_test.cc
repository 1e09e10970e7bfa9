// SPDX-License-Identifier: Apache-2.0
// Version 1 of the register window, as a driver from before virtio 1.0 uses it.
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/unique_fd.h"
#include "virtio/mmio_transport.h"

namespace minivmm::virtio {
namespace {

class OldDevice final : public Device {
 public:
  uint32_t device_id() const noexcept override { return 2; }
  uint64_t features() const noexcept override {
    return uint64_t{1} << VIRTIO_F_VERSION_1 | 1 << 9 | 1 << 28;
  }
  uint16_t queue_count() const noexcept override { return 2; }
  uint16_t max_queue_size() const noexcept override { return 128; }
  void read_config(uint64_t, std::span<std::byte> data) override {
    std::fill(data.begin(), data.end(), std::byte{7});
  }
  void write_config(uint64_t offset, std::span<const std::byte>) override { written = offset; }
  void accept_features(uint64_t features) override { accepted = features; }
  void activate(std::span<const QueueSetup> queues) override {
    active.assign(queues.begin(), queues.end());
  }
  void notify(uint16_t) noexcept override {}
  bool stop_queue(uint16_t queue) override {
    stopped.push_back(queue);
    return true;
  }
  bool reset() override {
    active.clear();
    return true;
  }

  uint64_t accepted = ~uint64_t{0};
  uint64_t written = ~uint64_t{0};
  std::vector<QueueSetup> active;
  std::vector<uint16_t> stopped;
};

class LegacyTransportTest : public testing::Test {
 protected:
  uint32_t get(uint64_t offset) {
    std::byte data[4];
    transport_.read(offset, data);
    return base::load_le<uint32_t>(data);
  }
  void set(uint64_t offset, uint32_t value) {
    std::byte data[4];
    base::store_le(data, value);
    transport_.write(offset, data);
  }
  void begin(uint32_t features) {
    set(VIRTIO_MMIO_STATUS, 0);
    set(VIRTIO_MMIO_STATUS, kDriver);
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    set(VIRTIO_MMIO_DRIVER_FEATURES, features);
    set(VIRTIO_MMIO_GUEST_PAGE_SIZE, 4096);
  }
  void place(uint32_t queue, uint32_t size, uint32_t alignment, uint32_t page) {
    set(VIRTIO_MMIO_QUEUE_SEL, queue);
    set(VIRTIO_MMIO_QUEUE_NUM, size);
    set(VIRTIO_MMIO_QUEUE_ALIGN, alignment);
    set(VIRTIO_MMIO_QUEUE_PFN, page);
  }
  static constexpr uint32_t kDriver = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
  static constexpr uint32_t kRunning = kDriver | VIRTIO_CONFIG_S_DRIVER_OK;

  base::UniqueFd irq_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  OldDevice device_;
  Signals signals_{irq_.get()};
  MmioTransport transport_{device_, signals_, "old", true};
};

TEST_F(LegacyTransportTest, SaysItIsVersionOneAndOffers32Features) {
  EXPECT_EQ(get(VIRTIO_MMIO_VERSION), 1u);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 1u << 9 | 1u << 28);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 0u);
}

TEST_F(LegacyTransportTest, AQueueIsOneAreaGivenByItsPage) {
  begin(1 << 9);
  set(VIRTIO_MMIO_QUEUE_SEL, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 0u);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_NUM_MAX), 128u);
  place(1, 64, 4096, 0x123);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 0x123u);
  set(VIRTIO_MMIO_STATUS, kRunning);
  EXPECT_EQ(device_.accepted, 1u << 9);
  ASSERT_EQ(device_.active.size(), 2u);
  EXPECT_FALSE(device_.active[0].ready);
  ASSERT_TRUE(device_.active[1].ready);
  const QueueLayout& layout = device_.active[1].layout;
  EXPECT_EQ(layout.size, 64u);
  EXPECT_EQ(layout.descriptors, 0x123000u);
  EXPECT_EQ(layout.available, 0x123000u + 64 * 16);
  EXPECT_EQ(layout.used, 0x124000u);  // the next page: 1024 + 4 + 128 + 2 bytes fit in the first
}

// The used ring stands behind the event index, at the driver's alignment and not at a page's.
TEST_F(LegacyTransportTest, TheUsedRingStandsAtTheDriversAlignment) {
  begin(1 << 9);
  place(0, 8, 4, 0x123);
  place(1, 8, 64, 0x125);
  set(VIRTIO_MMIO_STATUS, kRunning);
  ASSERT_EQ(device_.active.size(), 2u);
  // 128 bytes of descriptors, 22 of the available ring.
  EXPECT_EQ(device_.active[0].layout.used, 0x123000u + 152);
  EXPECT_EQ(device_.active[1].layout.used, 0x125000u + 192);
}

// Linux says it once, before it resets the device for the first time.
TEST_F(LegacyTransportTest, ThePageSizeOutlivesAReset) {
  set(VIRTIO_MMIO_GUEST_PAGE_SIZE, 4096);
  set(VIRTIO_MMIO_STATUS, 0);
  set(VIRTIO_MMIO_STATUS, kDriver);
  place(0, 64, 4096, 5);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 5u);
}

// It never hears of FEATURES_OK, neither way.
TEST_F(LegacyTransportTest, FeaturesOkIsNoBitOfTheirs) {
  begin(0);
  set(VIRTIO_MMIO_STATUS, kDriver | VIRTIO_CONFIG_S_FEATURES_OK);
  EXPECT_EQ(device_.accepted, ~uint64_t{0});
  set(VIRTIO_MMIO_STATUS, kRunning);
  EXPECT_EQ(get(VIRTIO_MMIO_STATUS), kRunning);
  // Written again without that bit, nothing was cleared.
  set(VIRTIO_MMIO_STATUS, kRunning);
  EXPECT_EQ(get(VIRTIO_MMIO_STATUS), kRunning);
  set(VIRTIO_MMIO_STATUS, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_STATUS), 0u);
}

TEST_F(LegacyTransportTest, FeaturesNotOfferedAreRefused) {
  begin(1 << 3);
  set(VIRTIO_MMIO_STATUS, kRunning);
  EXPECT_EQ(device_.accepted, ~uint64_t{0});
  EXPECT_TRUE(device_.active.empty());
  EXPECT_NE(get(VIRTIO_MMIO_STATUS) & VIRTIO_CONFIG_S_NEEDS_RESET, 0u);
}

TEST_F(LegacyTransportTest, PageZeroTakesAQueueBack) {
  begin(0);
  place(0, 64, 4096, 5);
  set(VIRTIO_MMIO_QUEUE_PFN, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 0u);
  place(0, 32, 4096, 6);
  set(VIRTIO_MMIO_STATUS, kRunning);
  ASSERT_TRUE(device_.active.at(0).ready);
  EXPECT_EQ(device_.active[0].layout.size, 32u);
  EXPECT_TRUE(device_.stopped.empty());
  set(VIRTIO_MMIO_QUEUE_PFN, 0);
  EXPECT_EQ(device_.stopped, std::vector<uint16_t>{0});
}

TEST_F(LegacyTransportTest, ImpossibleSizesPlaceNothing) {
  struct Case {
    uint32_t page_size, size, alignment;
  };
  for (const Case& c : {Case{0, 64, 4096}, Case{4095, 64, 4096}, Case{0x80000000, 64, 4096},
                        Case{4096, 64, 3}, Case{4096, 0x10000, 4096}}) {
    begin(0);
    set(VIRTIO_MMIO_GUEST_PAGE_SIZE, c.page_size);
    place(0, c.size, c.alignment, 5);
    EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 0u) << c.page_size << " " << c.size;
  }
}

TEST_F(LegacyTransportTest, ARunningQueueDoesNotMove) {
  begin(0);
  place(0, 64, 4096, 5);
  set(VIRTIO_MMIO_STATUS, kRunning);
  place(0, 32, 4096, 6);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 5u);
  set(VIRTIO_MMIO_STATUS, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_PFN), 0u);
}

TEST_F(LegacyTransportTest, ConfigurationIsWrittenOnceItRuns) {
  begin(0);
  set(VIRTIO_MMIO_CONFIG + 8, 1);
  EXPECT_EQ(device_.written, ~uint64_t{0});
  set(VIRTIO_MMIO_STATUS, kRunning);
  set(VIRTIO_MMIO_CONFIG + 8, 1);
  EXPECT_EQ(device_.written, 8u);
}

}  // namespace
}  // namespace minivmm::virtio
