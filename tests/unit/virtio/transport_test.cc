// SPDX-License-Identifier: Apache-2.0
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "virtio/mmio_transport.h"

namespace minivmm::virtio {
namespace {

constexpr uint32_t kAck = VIRTIO_CONFIG_S_ACKNOWLEDGE;
constexpr uint32_t kDriver = kAck | VIRTIO_CONFIG_S_DRIVER;
constexpr uint32_t kFeaturesOk = kDriver | VIRTIO_CONFIG_S_FEATURES_OK;
constexpr uint32_t kDriverOk = kFeaturesOk | VIRTIO_CONFIG_S_DRIVER_OK;
constexpr uint64_t kVersion1 = uint64_t{1} << VIRTIO_F_VERSION_1;
constexpr uint64_t kOffered = kVersion1 | 0x5;

// Records what the transport asks of it.
class FakeDevice final : public Device {
 public:
  uint32_t device_id() const noexcept override { return 2; }
  uint64_t features() const noexcept override { return kOffered; }
  uint16_t queue_count() const noexcept override { return 2; }
  uint16_t max_queue_size() const noexcept override { return 128; }
  void read_config(uint64_t offset, std::span<std::byte> data) override {
    for (size_t i = 0; i < data.size(); ++i) {
      if (offset + i < sizeof config) data[i] = config[offset + i];
    }
  }
  void write_config(uint64_t offset, std::span<const std::byte> data) override {
    for (size_t i = 0; i < data.size(); ++i) {
      if (offset + i < sizeof config) config[offset + i] = data[i];
    }
  }
  void accept_features(uint64_t features) override { accepted = features; }
  void activate(std::span<const QueueSetup> queues) override {
    if (refuse) throw base::Error(EINVAL, "queue 0 is nowhere");
    active.assign(queues.begin(), queues.end());
  }
  void notify(uint16_t queue) noexcept override { notified.push_back(queue); }
  bool stop_queue(uint16_t queue) override {
    stopped.push_back(queue);
    return true;
  }
  bool reset() override {
    entered_reset = true;
    if (reset_gate.valid()) reset_gate.wait();
    ++resets;
    active.clear();
    return !give_up;
  }

  std::byte config[12]{};
  bool refuse = false;
  bool give_up = false;
  std::shared_future<void> reset_gate;
  std::atomic<bool> entered_reset{false};
  uint64_t accepted = 0;
  std::vector<QueueSetup> active;
  std::vector<uint16_t> notified;
  std::vector<uint16_t> stopped;
  unsigned resets = 0;
};

class TransportTest : public testing::Test {
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
  void set_status(uint32_t value) { set(VIRTIO_MMIO_STATUS, value); }
  uint32_t status() { return get(VIRTIO_MMIO_STATUS); }
  void choose_features(uint64_t features) {
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    set(VIRTIO_MMIO_DRIVER_FEATURES, static_cast<uint32_t>(features));
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    set(VIRTIO_MMIO_DRIVER_FEATURES, static_cast<uint32_t>(features >> 32));
  }
  void negotiate() {
    set_status(0);
    set_status(kAck);
    set_status(kDriver);
    choose_features(kVersion1);
    set_status(kFeaturesOk);
    ASSERT_EQ(status(), kFeaturesOk);
  }
  bool interrupted() {
    uint64_t count = 0;
    return ::read(irq_.get(), &count, sizeof count) == sizeof count;
  }

  base::UniqueFd irq_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  FakeDevice device_;
  Signals signals_{irq_.get()};
  MmioTransport transport_{device_, signals_, "disk0"};
};

TEST_F(TransportTest, IdentifiesItself) {
  EXPECT_EQ(get(VIRTIO_MMIO_MAGIC_VALUE), 0x74726976U);
  EXPECT_EQ(get(VIRTIO_MMIO_VERSION), 2U);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_ID), 2U);
  EXPECT_NE(get(VIRTIO_MMIO_VENDOR_ID), 0U);
  EXPECT_EQ(status(), 0U);
}

TEST_F(TransportTest, RegistersTakeFourAlignedBytesOnly) {
  std::byte data[8];
  for (const size_t size : {1U, 2U, 8U}) {
    std::fill(std::begin(data), std::end(data), std::byte{0xee});
    transport_.read(VIRTIO_MMIO_MAGIC_VALUE, std::span(data).first(size));
    for (size_t i = 0; i < size; ++i) EXPECT_EQ(data[i], std::byte{0});
  }
  transport_.read(2, std::span(data).first(4));
  EXPECT_EQ(base::load_le<uint32_t>(data), 0U);
  const std::byte one[1] = {std::byte{1}};
  transport_.write(VIRTIO_MMIO_STATUS, one);
  EXPECT_EQ(status(), 0U);
}

TEST_F(TransportTest, ReservedAndLegacyRegistersReadZeroAndIgnoreWrites) {
  for (uint64_t offset = 0; offset < VIRTIO_MMIO_CONFIG; offset += 4) {
    switch (offset) {
      case VIRTIO_MMIO_MAGIC_VALUE:
      case VIRTIO_MMIO_VERSION:
      case VIRTIO_MMIO_DEVICE_ID:
      case VIRTIO_MMIO_VENDOR_ID:
      case VIRTIO_MMIO_DEVICE_FEATURES:
      case VIRTIO_MMIO_QUEUE_NUM_MAX:
      case VIRTIO_MMIO_SHM_LEN_LOW:
      case VIRTIO_MMIO_SHM_LEN_HIGH:
      case VIRTIO_MMIO_SHM_BASE_LOW:
      case VIRTIO_MMIO_SHM_BASE_HIGH:
      case VIRTIO_MMIO_STATUS:
        continue;
      default:
        EXPECT_EQ(get(offset), 0U) << offset;
        set(offset, 0xffffffff);
        EXPECT_EQ(get(offset), 0U) << offset;
    }
  }
}

TEST_F(TransportTest, ThereIsNoSharedMemory) {
  set(VIRTIO_MMIO_SHM_SEL, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_SHM_LEN_LOW), 0xffffffffU);
  EXPECT_EQ(get(VIRTIO_MMIO_SHM_LEN_HIGH), 0xffffffffU);
  EXPECT_EQ(get(VIRTIO_MMIO_SHM_BASE_LOW), 0xffffffffU);
  EXPECT_EQ(get(VIRTIO_MMIO_SHM_BASE_HIGH), 0xffffffffU);
}

TEST_F(TransportTest, FeaturesAreReadByHalves) {
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 5U);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 1U);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 0U);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0xffffffff);
  EXPECT_EQ(get(VIRTIO_MMIO_DEVICE_FEATURES), 0U);
}

TEST_F(TransportTest, NegotiationReachesTheDevice) {
  set_status(kAck);
  set_status(kDriver);
  choose_features(kVersion1 | 4);
  set_status(kFeaturesOk);
  EXPECT_EQ(status(), kFeaturesOk);
  EXPECT_EQ(device_.accepted, kVersion1 | 4);
}

TEST_F(TransportTest, FeaturesThatCannotBeAreRefused) {
  struct Case {
    const char* why;
    uint64_t features;
    uint32_t beyond;  // features 64 to 95
  };
  for (const Case& c :
       {Case{"not offered", kVersion1 | 2, 0}, Case{"no VERSION_1", 5, 0},
        Case{"beyond the 64th", kVersion1, 1}, Case{"everything", ~uint64_t{0}, 0}}) {
    set_status(0);
    set_status(kDriver);
    choose_features(c.features);
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    set(VIRTIO_MMIO_DRIVER_FEATURES, c.beyond);
    set_status(kFeaturesOk);
    EXPECT_EQ(status(), kDriver) << c.why;
    // And the device cannot be started past it.
    set_status(kDriverOk);
    EXPECT_EQ(status(), kDriver) << c.why;
  }
  EXPECT_EQ(device_.accepted, 0U);
  // A refused driver may choose again.
  set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
  set_status(0);
  negotiate();
}

TEST_F(TransportTest, FeaturesCannotChangeOnceAccepted) {
  negotiate();
  choose_features(kVersion1 | 5);
  set_status(kDriverOk);
  EXPECT_EQ(device_.accepted, kVersion1);
}

TEST_F(TransportTest, StatusFollowsItsOrder) {
  set_status(VIRTIO_CONFIG_S_FEATURES_OK);
  EXPECT_EQ(status(), 0U);
  set_status(VIRTIO_CONFIG_S_DRIVER_OK);
  EXPECT_EQ(status(), 0U);
  EXPECT_TRUE(device_.active.empty());
  negotiate();
  // Clearing bits takes a reset; what would be set with it is not.
  set_status(kAck);
  EXPECT_EQ(status(), kFeaturesOk);
  set_status(VIRTIO_CONFIG_S_DRIVER_OK);
  EXPECT_EQ(status(), kFeaturesOk);
  EXPECT_TRUE(device_.active.empty());
  set_status(kDriverOk);
  EXPECT_EQ(status(), kDriverOk);
  // Bits that do not exist, and the device's own, cannot be set.
  set_status(kDriverOk | 0xffffff00 | VIRTIO_CONFIG_S_NEEDS_RESET | 0x30);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(TransportTest, AFailedDriverGetsNoFurther) {
  negotiate();
  set_status(kFeaturesOk | VIRTIO_CONFIG_S_FAILED);
  EXPECT_EQ(status(), kFeaturesOk | VIRTIO_CONFIG_S_FAILED);
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  set_status(kDriverOk | VIRTIO_CONFIG_S_FAILED);
  EXPECT_TRUE(device_.active.empty());
  EXPECT_EQ(status(), kFeaturesOk | VIRTIO_CONFIG_S_FAILED);
  set_status(0);
  EXPECT_EQ(status(), 0U);
  negotiate();
}

TEST_F(TransportTest, QueuesAreSetUpThroughTheSelector) {
  negotiate();
  set(VIRTIO_MMIO_QUEUE_SEL, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_NUM_MAX), 128U);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  set(VIRTIO_MMIO_QUEUE_NUM, 64);
  set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x11111110);
  set(VIRTIO_MMIO_QUEUE_DESC_HIGH, 1);
  set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0x22222220);
  set(VIRTIO_MMIO_QUEUE_AVAIL_HIGH, 2);
  set(VIRTIO_MMIO_QUEUE_USED_LOW, 0x33333330);
  set(VIRTIO_MMIO_QUEUE_USED_HIGH, 3);
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 1U);
  set(VIRTIO_MMIO_QUEUE_SEL, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  set_status(kDriverOk);
  ASSERT_EQ(device_.active.size(), 2U);
  EXPECT_FALSE(device_.active[0].ready);
  EXPECT_EQ(device_.active[0].layout.size, 128U);
  ASSERT_TRUE(device_.active[1].ready);
  const QueueLayout& layout = device_.active[1].layout;
  EXPECT_EQ(layout.size, 64U);
  EXPECT_EQ(layout.descriptors, 0x111111110U);
  EXPECT_EQ(layout.available, 0x222222220U);
  EXPECT_EQ(layout.used, 0x333333330U);
}

TEST_F(TransportTest, AQueueThatDoesNotExistIsInert) {
  negotiate();
  for (const uint32_t queue : {2U, 0x10000U, 0xffffffffU}) {
    set(VIRTIO_MMIO_QUEUE_SEL, queue);
    EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_NUM_MAX), 0U);
    set(VIRTIO_MMIO_QUEUE_NUM, 16);
    set(VIRTIO_MMIO_QUEUE_READY, 1);
    EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
    set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
  }
  EXPECT_TRUE(device_.notified.empty());
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
  EXPECT_EQ(device_.notified, std::vector<uint16_t>{1});
}

// The size and place of a queue that runs must not change: devices were broken out of that way.
TEST_F(TransportTest, QueueRegistersHoldOnceReadyOrRunning) {
  set(VIRTIO_MMIO_QUEUE_NUM, 8);  // before FEATURES_OK: ignored
  negotiate();
  set(VIRTIO_MMIO_QUEUE_NUM, 16);
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  set(VIRTIO_MMIO_QUEUE_NUM, 32);  // while ready: ignored
  set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0x1000);
  set_status(kDriverOk);
  EXPECT_EQ(device_.active[0].layout.size, 16U);
  EXPECT_EQ(device_.active[0].layout.descriptors, 0U);
  set(VIRTIO_MMIO_QUEUE_SEL, 1);
  set(VIRTIO_MMIO_QUEUE_READY, 1);  // too late
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
}

TEST_F(TransportTest, AQueueCanBeTakenBack) {
  negotiate();
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  set(VIRTIO_MMIO_QUEUE_READY, 0);  // before the start: only forgotten
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  EXPECT_TRUE(device_.stopped.empty());
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  set_status(kDriverOk);
  set(VIRTIO_MMIO_QUEUE_READY, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  EXPECT_EQ(device_.stopped, std::vector<uint16_t>{0});
}

TEST_F(TransportTest, ResetForgetsTheDriver) {
  negotiate();
  set(VIRTIO_MMIO_QUEUE_NUM, 16);
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  set_status(kDriverOk);
  signals_.used_buffers();
  set_status(0);
  EXPECT_EQ(device_.resets, 1U + 1U);  // negotiate() begins with one
  EXPECT_EQ(status(), 0U);
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), 0U);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  // The features too: FEATURES_OK without choosing them again fails.
  set_status(kDriver);
  set_status(kFeaturesOk);
  EXPECT_EQ(status(), kDriver);
}

TEST_F(TransportTest, InterruptsHaveCausesThatAreAcknowledged) {
  negotiate();
  set_status(kDriverOk);
  EXPECT_FALSE(interrupted());
  signals_.used_buffers();
  EXPECT_TRUE(interrupted());
  signals_.config_changed();
  EXPECT_TRUE(interrupted());
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), 3U);
  set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), 2U);
  set(VIRTIO_MMIO_INTERRUPT_ACK, 0xffffffff);
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), 0U);
}

TEST_F(TransportTest, ConfigChangesAreToldOnlyToARunningDriver) {
  signals_.config_changed();
  EXPECT_FALSE(interrupted());
  const uint32_t before = get(VIRTIO_MMIO_CONFIG_GENERATION);
  signals_.next_generation();
  EXPECT_NE(get(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

TEST_F(TransportTest, ADeviceThatCannotStartNeedsReset) {
  device_.refuse = true;
  negotiate();
  set_status(kDriverOk);
  EXPECT_EQ(status(), kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET);
  // With a configuration interrupt, as the specification has it.
  EXPECT_TRUE(interrupted());
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), uint32_t{VIRTIO_MMIO_INT_CONFIG});
  // Writing the status back, as drivers do, changes nothing.
  set_status(kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET);
  EXPECT_EQ(status(), kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET);
  device_.refuse = false;
  set_status(0);
  negotiate();
  set_status(kDriverOk);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(TransportTest, ResetReturnsOnlyWhenTheDeviceIsIdle) {
  negotiate();
  set_status(kDriverOk);
  std::promise<void> gate;
  device_.reset_gate = gate.get_future().share();
  device_.entered_reset = false;
  std::thread vcpu([&] { set_status(0); });
  while (!device_.entered_reset) std::this_thread::yield();
  // Another vCPU meanwhile: sees a device that is not reset yet, and is not blocked.
  EXPECT_EQ(status(), kDriverOk);
  EXPECT_EQ(get(VIRTIO_MMIO_INTERRUPT_STATUS), 0U);
  set(VIRTIO_MMIO_QUEUE_SEL, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_NUM_MAX), 128U);
  // A second reset waits for the first one.
  std::thread second([&] { set_status(0); });
  gate.set_value();
  vcpu.join();
  second.join();
  EXPECT_EQ(status(), 0U);
}

TEST_F(TransportTest, AResetThatWasGivenUpDoesNotLookDone) {
  negotiate();
  set_status(kDriverOk);
  device_.give_up = true;
  set_status(0);
  EXPECT_NE(status(), 0U);
}

TEST_F(TransportTest, ConfigTakesAllSizesOnceFeaturesAreSettled) {
  device_.config[0] = std::byte{0x11};
  device_.config[7] = std::byte{0x77};
  std::byte data[8];
  transport_.read(VIRTIO_MMIO_CONFIG, std::span(data).first(1));
  EXPECT_EQ(data[0], std::byte{0x11});
  transport_.read(VIRTIO_MMIO_CONFIG + 6, std::span(data).first(2));
  EXPECT_EQ(data[1], std::byte{0x77});
  transport_.read(VIRTIO_MMIO_CONFIG, data);
  EXPECT_EQ(data[7], std::byte{0x77});
  // Past its end: zeroes.
  transport_.read(VIRTIO_MMIO_CONFIG + 100, data);
  EXPECT_EQ(base::load_le<uint64_t>(data), 0U);
  const std::byte one[1] = {std::byte{9}};
  transport_.write(VIRTIO_MMIO_CONFIG + 4, one);
  EXPECT_EQ(device_.config[4], std::byte{0});
  negotiate();
  transport_.write(VIRTIO_MMIO_CONFIG + 4, one);
  EXPECT_EQ(device_.config[4], std::byte{9});
}

TEST_F(TransportTest, DescribesItself) {
  negotiate();
  EXPECT_NE(transport_.describe().find("disk0: virtio-mmio, status ACKNOWLEDGE DRIVER FEATURES_OK"),
            std::string::npos)
      << transport_.describe();
}

}  // namespace
}  // namespace minivmm::virtio
