// SPDX-License-Identifier: Apache-2.0
#include "vmm/bus.h"

#include <array>

#include <gtest/gtest.h>

#include "base/error.h"

namespace minivmm::vmm {
namespace {

class Recorder final : public BusDevice {
 public:
  void read(uint64_t offset, std::span<std::byte> data) override {
    last_offset = offset;
    for (auto& byte : data) byte = std::byte{0x5a};
  }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    last_offset = offset;
    written.assign(data.begin(), data.end());
  }
  uint64_t last_offset = ~uint64_t{0};
  std::vector<std::byte> written;
};

int error_of(Bus& bus, uint64_t base, uint64_t size, BusDevice& device) {
  try {
    bus.add(base, size, "new", device);
  } catch (const base::Error& error) {
    return error.err();
  }
  return 0;
}

TEST(Bus, GivesOffsetsFromTheStartOfTheRange) {
  Bus bus("test");
  Recorder a;
  Recorder b;
  bus.add(0x2000, 0x1000, "b", b);
  bus.add(0x1000, 0x1000, "a", a);
  std::array<std::byte, 4> data{};
  EXPECT_TRUE(bus.read(0x1ffc, data));
  EXPECT_EQ(a.last_offset, 0xffcu);
  EXPECT_EQ(data[3], std::byte{0x5a});
  EXPECT_TRUE(bus.write(0x2000, data));
  EXPECT_EQ(b.last_offset, 0u);
  EXPECT_EQ(b.written.size(), 4u);
}

// A device that got such an access would have to check every length itself.
TEST(Bus, RefusesAccessesThatCrossTheEndOfADevice) {
  Bus bus("test");
  Recorder a;
  Recorder b;
  bus.add(0x1000, 0x1000, "a", a);
  bus.add(0x2000, 0x1000, "b", b);
  std::array<std::byte, 8> data{};
  EXPECT_FALSE(bus.read(0x1ffc, data));
  EXPECT_FALSE(bus.write(0x2ffc, data));
  EXPECT_FALSE(bus.read(0xfff, std::span(data).first(2)));
  EXPECT_EQ(a.last_offset, ~uint64_t{0});
  EXPECT_EQ(b.last_offset, ~uint64_t{0});
}

TEST(Bus, LeavesUnclaimedAddressesToTheCaller) {
  Bus bus("test");
  Recorder a;
  bus.add(0x1000, 8, "a", a);
  std::array<std::byte, 1> data{std::byte{0x77}};
  EXPECT_FALSE(bus.read(0xfff, data));
  EXPECT_FALSE(bus.read(0x1008, data));
  EXPECT_EQ(data[0], std::byte{0x77});
  EXPECT_FALSE(bus.read(0x1000, {}));
}

TEST(Bus, RefusesOverlapsAndImpossibleRanges) {
  Bus bus("test");
  Recorder a;
  bus.add(0x1000, 0x1000, "a", a);
  EXPECT_EQ(error_of(bus, 0x1000, 0x1000, a), EBUSY);
  EXPECT_EQ(error_of(bus, 0xfff, 2, a), EBUSY);
  EXPECT_EQ(error_of(bus, 0x1fff, 1, a), EBUSY);
  EXPECT_EQ(error_of(bus, 0, 0x10000, a), EBUSY);
  EXPECT_EQ(error_of(bus, 0x3000, 0, a), EINVAL);
  EXPECT_EQ(error_of(bus, ~uint64_t{0}, 2, a), EINVAL);
  // Neighbours and the last byte of the address space are fine.
  EXPECT_EQ(error_of(bus, 0xfff, 1, a), 0);
  EXPECT_EQ(error_of(bus, 0x2000, 1, a), 0);
  EXPECT_EQ(error_of(bus, ~uint64_t{0}, 1, a), 0);
  std::array<std::byte, 1> data{};
  EXPECT_TRUE(bus.read(~uint64_t{0}, data));
}

TEST(Bus, NamesBothDevicesOfAConflict) {
  Bus bus("mmio");
  Recorder a;
  bus.add(0x1000, 0x1000, "first disk", a);
  try {
    bus.add(0x1800, 0x1000, "second disk", a);
    FAIL();
  } catch (const base::Error& error) {
    EXPECT_NE(std::string(error.what()).find("first disk"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("second disk"), std::string::npos);
  }
}

}  // namespace
}  // namespace minivmm::vmm
