// SPDX-License-Identifier: Apache-2.0
#include "vmm/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include <gtest/gtest.h>

#include "base/error.h"
#include "vmm/layout.h"
#include "vmm/memory_map.h"

namespace minivmm::vmm {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

// Devices live in the hole; RAM there would answer in their place.
TEST(Memory, LeavesTheDeviceHoleFree) {
  const Memory memory({.size = kHoleStart + 16 * kMiB});
  EXPECT_NE(memory.view().at(kHoleStart - 4096, 4096), nullptr);
  EXPECT_EQ(memory.view().at(kHoleStart - 4096, 4097), nullptr);
  EXPECT_EQ(memory.view().at(kVirtioWindowBase, 1), nullptr);
  EXPECT_EQ(memory.view().at(kHoleEnd - 1, 1), nullptr);
  EXPECT_NE(memory.view().at(kHoleEnd, 16 * kMiB), nullptr);
  EXPECT_EQ(memory.view().at(kHoleEnd, 16 * kMiB + 1), nullptr);
}

// KVM maps a huge page only where guest and host addresses agree on its boundaries.
TEST(Memory, HugePagesCanBeUsed) {
  for (const bool shared : {false, true}) {
    const Memory memory({.size = kHoleStart + 16 * kMiB + 4096, .shared = shared});
    ASSERT_EQ(memory.view().regions().size(), 2u);
    for (const auto& region : memory.view().regions()) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(region.host) % (2 * kMiB), 0u);
    }
  }
}

TEST(Memory, RefusesImpossibleSizes) {
  for (const uint64_t size : {uint64_t{0}, uint64_t{4096}, 2 * kMiB + 1, ~uint64_t{0} - 4095}) {
    EXPECT_THROW(Memory({.size = size}), base::Error) << size;
  }
}

TEST(Memory, NamesWhatDoesNotFit) {
  const Memory memory({.size = 2 * kMiB});
  EXPECT_EQ(memory.bytes(0, 2 * kMiB, "all").size(), 2 * kMiB);
  try {
    (void)memory.bytes(2 * kMiB - 1, 2, "the kernel");
    FAIL();
  } catch (const base::Error& error) {
    EXPECT_EQ(error.err(), EFAULT);
    EXPECT_NE(std::string(error.what()).find("the kernel"), std::string::npos);
  }
}

// A second process that maps the memfd must see what the guest sees, on both sides of the hole.
TEST(Memory, SharedMemoryIsOneFileWithoutTheHole) {
  const Memory memory({.size = kHoleStart + kMiB, .shared = true});
  ASSERT_GE(memory.memfd(), 0);
  std::memcpy(memory.bytes(0x1234, 4, "low").data(), "low!", 4);
  std::memcpy(memory.bytes(kHoleEnd + 8, 4, "high").data(), "high", 4);
  char text[4] = {};
  ASSERT_EQ(::pread(memory.memfd(), text, 4, 0x1234), 4);
  EXPECT_EQ(std::memcmp(text, "low!", 4), 0);
  ASSERT_EQ(::pread(memory.memfd(), text, 4, static_cast<off_t>(kHoleStart + 8)), 4);
  EXPECT_EQ(std::memcmp(text, "high", 4), 0);
}

TEST(Memory, TouchesNothingAtConstruction) {
  const Memory memory({.size = 64 * kMiB});
  const auto& region = memory.view().regions().front();
  std::vector<unsigned char> resident(region.size / 4096);
  ASSERT_EQ(::mincore(region.host, region.size, resident.data()), 0);
  for (const auto page : resident) ASSERT_EQ(page & 1, 0);
}

TEST(Memory, PreallocTouchesAllOfIt) {
  for (const bool shared : {false, true}) {
    const Memory memory({.size = 16 * kMiB, .shared = shared, .prealloc = true});
    const auto& region = memory.view().regions().front();
    std::vector<unsigned char> resident(region.size / 4096);
    ASSERT_EQ(::mincore(region.host, region.size, resident.data()), 0);
    for (const auto page : resident) ASSERT_EQ(page & 1, 1);
  }
}

// Without pages in reserve a guest would be killed in the middle; it is refused at the start.
TEST(Memory, ReservedHugePagesAreTakenAtOnceOrRefused) {
  EXPECT_THROW(Memory({.size = 16 * kMiB, .huge_page_bytes = 4096}), base::Error);
  EXPECT_THROW(Memory({.size = 3 * kMiB, .huge_page_bytes = 2 * kMiB}), base::Error);
  try {
    const Memory memory({.size = 4 * kMiB, .huge_page_bytes = 2 * kMiB});
    std::vector<unsigned char> resident(4 * kMiB / 4096);
    const auto& region = memory.view().regions().front();
    ASSERT_EQ(::mincore(region.host, region.size, resident.data()), 0);
    for (const auto page : resident) ASSERT_EQ(page & 1, 1);
  } catch (const base::Error& error) {
    EXPECT_NE(std::string(error.what()).find("nr_hugepages"), std::string::npos) << error.what();
  }
}

TEST(MemoryMap, CoversTheRamOnceAndKeepsTheFirmwareRange) {
  for (const uint64_t size : {16 * kMiB, kHoleStart, kHoleStart + kMiB, 64 * 1024 * kMiB}) {
    uint64_t ram = 0;
    uint64_t previous_end = 0;
    for (const auto& entry : make_memory_map(size)) {
      EXPECT_GE(entry.address, previous_end);
      previous_end = entry.address + entry.size;
      if (entry.kind != MemoryKind::kRam) continue;
      ram += entry.size;
      EXPECT_TRUE(entry.address + entry.size <= kHoleStart || entry.address >= kHoleEnd);
    }
    EXPECT_EQ(ram, size - (kKernelAddress - kLowRamEnd));
    EXPECT_EQ(previous_end, size > kHoleStart ? size + (kHoleEnd - kHoleStart) : size);
  }
}

}  // namespace
}  // namespace minivmm::vmm
