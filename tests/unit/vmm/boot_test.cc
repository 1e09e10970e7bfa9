// SPDX-License-Identifier: Apache-2.0
// Loader, zero page, PVH structures, page tables.
#include <cstring>
#include <functional>
#include <random>

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "tests/unit/vmm/elf_builder.h"
#include "vmm/bzimage.h"
#include "vmm/layout.h"
#include "vmm/linux_boot.h"
#include "vmm/loader.h"
#include "vmm/memory.h"
#include "vmm/pvh.h"

namespace minivmm::vmm {
namespace {

using base::load_le;
using base::store_le;
using test::TestElf;

constexpr uint64_t kMiB = uint64_t{1} << 20;

// A bzImage with two setup sectors and `payload` bytes, each 0xc3.
std::vector<std::byte> make_bzimage(uint32_t payload = 0x1000) {
  std::vector<std::byte> out(0x600 + payload, std::byte{0xc3});
  std::fill(out.begin(), out.begin() + 0x600, std::byte{0});
  store_le<uint8_t>(&out[0x1f1], 2);
  store_le<uint32_t>(&out[0x1f4], payload / 16);
  store_le<uint16_t>(&out[0x1fe], 0xaa55);
  store_le<uint8_t>(&out[0x201], 0x6a);  // header ends at 0x26c
  std::memcpy(&out[0x202], "HdrS", 4);
  store_le<uint16_t>(&out[0x206], 0x20f);
  store_le<uint8_t>(&out[0x211], 1);
  store_le<uint32_t>(&out[0x22c], 0x7fffffff);
  store_le<uint16_t>(&out[0x236], 0x7f);
  store_le<uint32_t>(&out[0x238], 2047);
  store_le<uint64_t>(&out[0x258], 0x1000000);
  store_le<uint32_t>(&out[0x260], 0x300000);
  return out;
}

BootState load(const std::vector<std::byte>& kernel, const Memory& memory,
               const std::string& command_line = "job=info",
               const std::vector<std::byte>* initrd = nullptr) {
  const SpanReader reader("kernel", kernel);
  const SpanReader initrd_reader(
      "initrd", initrd == nullptr ? std::span<const std::byte>() : std::span(*initrd));
  LoadRequest request;
  request.kernel = &reader;
  request.initrd = initrd == nullptr ? nullptr : &initrd_reader;
  request.command_line = command_line;
  request.ram_size = memory.size();
  return load_kernel(request, memory.view());
}

std::string load_error(const std::vector<std::byte>& kernel, uint64_t ram = 64 * kMiB,
                       const std::string& command_line = {}) {
  const Memory memory({.size = ram});
  try {
    (void)load(kernel, memory, command_line);
  } catch (const base::Error& error) {
    return error.what();
  }
  return {};
}

const std::byte* at(const Memory& memory, uint64_t address) { return memory.view().at(address, 1); }

TEST(Loader, EntersAPvhKernelWithItsStartInfo) {
  const Memory memory({.size = 64 * kMiB});
  const std::vector<std::byte> initrd(5000, std::byte{7});
  const BootState state = load(TestElf({0xf4, 0xab}).bytes(), memory, "a=b c", &initrd);
  EXPECT_EQ(state.mode, EntryMode::kProtected32);
  EXPECT_EQ(state.entry, 0x200000u);
  EXPECT_EQ(*at(memory, 0x200001), std::byte{0xab});
  const auto* info = at(memory, state.boot_data);
  EXPECT_EQ(load_le<uint32_t>(info), kPvhMagic);
  EXPECT_EQ(load_le<uint32_t>(info + 4), 1u);
  const auto command_line = load_le<uint64_t>(info + 24);
  EXPECT_STREQ(reinterpret_cast<const char*>(at(memory, command_line)), "a=b c");
  ASSERT_EQ(load_le<uint32_t>(info + 12), 1u);
  const auto* module = at(memory, load_le<uint64_t>(info + 16));
  const auto initrd_at = load_le<uint64_t>(module);
  EXPECT_EQ(load_le<uint64_t>(module + 8), 5000u);
  EXPECT_EQ(initrd_at % 4096, 0u);
  EXPECT_EQ(*at(memory, initrd_at + 4999), std::byte{7});
  const auto* map = at(memory, load_le<uint64_t>(info + 40));
  ASSERT_EQ(load_le<uint32_t>(info + 48), 3u);
  EXPECT_EQ(load_le<uint64_t>(map + 2 * 24), 0x100000u);
  EXPECT_EQ(load_le<uint64_t>(map + 2 * 24 + 8), 63 * kMiB);
}

TEST(Loader, EntersABzImageAtItsSixtyFourBitEntry) {
  const Memory memory({.size = 64 * kMiB});
  const std::vector<std::byte> initrd(4097, std::byte{7});
  const BootState state = load(make_bzimage(), memory, "quiet", &initrd);
  EXPECT_EQ(state.mode, EntryMode::kLong64);
  EXPECT_EQ(state.entry, kKernelAddress + 0x200);
  EXPECT_EQ(*at(memory, kKernelAddress), std::byte{0xc3});
  EXPECT_EQ(*at(memory, kKernelAddress + 0xfff), std::byte{0xc3});
  const auto* page = at(memory, state.boot_data);
  EXPECT_EQ(load_le<uint32_t>(page + 0x228), kCommandLineAddress);
  EXPECT_EQ(load_le<uint8_t>(page + 0x210), 0xff);
  EXPECT_EQ(load_le<uint16_t>(page + 0x206), 0x20f);
  EXPECT_EQ(load_le<uint32_t>(page + 0x21c), 4097u);
  EXPECT_EQ(load_le<uint8_t>(page + 0x1e8), 3);
  // The initrd must not lie where the kernel unpacks itself.
  EXPECT_GE(load_le<uint32_t>(page + 0x218), 0x1300000u);
}

TEST(Loader, EntersAVmlinuxWithoutANoteByTheLinuxProtocol) {
  const Memory memory({.size = 64 * kMiB});
  const BootState state = load(TestElf({0xf4}, 0x1000000, false).bytes(), memory);
  EXPECT_EQ(state.mode, EntryMode::kLong64);
  EXPECT_EQ(state.entry, 0x1000000u);
  EXPECT_EQ(std::memcmp(at(memory, state.boot_data + 0x202), "HdrS", 4), 0);
}

// The seed is found by the list that the zero page begins.
TEST(Loader, GivesLinuxASeedForItsRandomNumbers) {
  const Memory memory({.size = 64 * kMiB});
  const auto kernel = make_bzimage();
  const SpanReader reader("kernel", kernel);
  const std::vector<std::byte> seed(32, std::byte{0x5a});
  LoadRequest request;
  request.kernel = &reader;
  request.ram_size = memory.size();
  request.rng_seed = seed;
  const BootState state = load_kernel(request, memory.view());
  const auto* data = at(memory, load_le<uint64_t>(at(memory, state.boot_data + 0x250)));
  EXPECT_EQ(load_le<uint64_t>(data), 0u) << "the last of the list";
  EXPECT_EQ(load_le<uint32_t>(data + 8), 9u) << "SETUP_RNG_SEED";
  ASSERT_EQ(load_le<uint32_t>(data + 12), 32u);
  EXPECT_EQ(std::memcmp(data + 16, seed.data(), seed.size()), 0);
}

// Listing devices in both ways makes a driver module refuse to be loaded.
TEST(Loader, ListsDevicesInOneWay) {
  struct Case {
    std::vector<std::byte> kernel;
    const char* command_line;
    DeviceListing listing;
    bool acpi;
  };
  TestElf knows_acpi({0xf4});
  for (const char c : std::string("RSD PTR ")) {
    knows_acpi.code.push_back(static_cast<uint8_t>(c));
  }
  knows_acpi.load.p_filesz = knows_acpi.load.p_memsz = knows_acpi.code.size();
  const auto plain = TestElf({0xf4}).bytes();
  for (const Case& c : {
           Case{plain, "quiet", DeviceListing::kAuto, false},
           Case{plain, "quiet", DeviceListing::kAcpi, true},
           Case{knows_acpi.bytes(), "quiet", DeviceListing::kAuto, true},
           Case{knows_acpi.bytes(), "quiet", DeviceListing::kCommandLine, false},
           Case{knows_acpi.bytes(), "a acpi=off", DeviceListing::kAuto, false},
           Case{knows_acpi.bytes(), "acpi=off b", DeviceListing::kAuto, false},
           Case{knows_acpi.bytes(), "xacpi=off acpi=offx", DeviceListing::kAuto, true},
           Case{make_bzimage(), "quiet", DeviceListing::kAuto, true},
           Case{make_bzimage(), "acpi=off", DeviceListing::kAuto, false},
       }) {
    SCOPED_TRACE(c.command_line);
    const Memory memory({.size = 64 * kMiB});
    const SpanReader reader("kernel", c.kernel);
    LoadRequest request;
    request.kernel = &reader;
    request.command_line = c.command_line;
    request.device_arguments = " virtio_mmio.device=4K@0xd0000000:5";
    request.listing = c.listing;
    request.ram_size = memory.size();
    const BootState state = load_kernel(request, memory.view());
    EXPECT_EQ(state.acpi, c.acpi);
    const bool linux_entry = state.mode == EntryMode::kLong64;
    EXPECT_EQ(load_le<uint64_t>(at(memory, state.boot_data + (linux_entry ? 0x70 : 32))),
              c.acpi ? kAcpiAddress : 0);
    const std::string text = reinterpret_cast<const char*>(at(memory, kCommandLineAddress));
    EXPECT_EQ(text, c.command_line + std::string(c.acpi ? "" : request.device_arguments));
  }
}

TEST(Loader, SaysWhyAFileIsRefused) {
  const auto expect = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << "wanted: " << part << ", got: " << text;
  };
  expect(load_error({}), "not a kernel");
  expect(load_error(std::vector<std::byte>(4096, std::byte{0x55})), "not a kernel");
  expect(load_error(TestElf({0xf4}, 0x1000).bytes()), "boot tables");
  expect(load_error(TestElf({0xf4}, 0x10000000).bytes()), "not in guest RAM");
  expect(load_error(TestElf({0xf4}, kVirtioWindowBase).bytes(), 4096 * kMiB), "not in guest RAM");
  expect(load_error(make_bzimage(), 16 * kMiB), "room to unpack");
  expect(load_error(make_bzimage(), 64 * kMiB, std::string(2048, 'x')), "command line");
  expect(load_error(TestElf({0xf4}).bytes(), 64 * kMiB, std::string(65536, 'x')), "command line");
  expect(load_error(TestElf({0xf4}).bytes(), 64 * kMiB, std::string("a\0b", 3)), "zero byte");
  TestElf huge({0xf4});
  huge.load.p_memsz = uint64_t{1} << 40;
  expect(load_error(huge.bytes()), "not in guest RAM");
}

TEST(BzImage, SaysWhatIsWrong) {
  const auto check = [](const char* part,
                        const std::function<void(std::vector<std::byte>&)>& spoil) {
    auto bytes = make_bzimage();
    spoil(bytes);
    std::string text;
    try {
      (void)parse_bzimage(SpanReader("kernel", bytes));
    } catch (const base::Error& error) {
      text = error.what();
    }
    EXPECT_NE(text.find(part), std::string::npos) << "wanted: " << part << ", got: " << text;
  };
  check("HdrS", [](auto& b) { b[0x202] = std::byte{'X'}; });
  check("too old", [](auto& b) { store_le<uint16_t>(&b[0x206], 0x20b); });
  check("zImage", [](auto& b) { b[0x211] = std::byte{0}; });
  check("32-bit", [](auto& b) { b[0x236] = std::byte{0x7e}; });
  check("setup header ends", [](auto& b) { b[0x201] = std::byte{0x10}; });
  check("setup header ends", [](auto& b) { b[0x201] = std::byte{0xff}; });
  check("truncated", [](auto& b) { store_le<uint32_t>(&b[0x1f4], 0xffffffff); });
  check("truncated", [](auto& b) { b[0x1f1] = std::byte{0xff}; });
  check("truncated", [](auto& b) { b.resize(0x210); });
  check("truncated", [](auto& b) { b.pop_back(); });
  check("no payload", [](auto& b) { store_le<uint32_t>(&b[0x1f4], 0); });
}

// Distributions sign their kernels behind the payload.
TEST(BzImage, MayBeLongerThanItsHeaderSays) {
  auto bytes = make_bzimage();
  bytes.resize(bytes.size() + 1472);
  EXPECT_EQ(parse_bzimage(SpanReader("kernel", bytes)).payload_size, 0x1000u);
}

TEST(BzImage, ZeroSetupSectorsMeanFour) {
  auto bytes = make_bzimage(0x2000);
  store_le<uint8_t>(&bytes[0x1f1], 0);
  store_le<uint32_t>(&bytes[0x1f4], 0x1000 / 16);
  EXPECT_EQ(parse_bzimage(SpanReader("kernel", bytes)).payload_offset, 5 * 512u);
}

TEST(BzImage, SurvivesRandomDamageOfItsHeader) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const Memory memory({.size = 32 * kMiB});
  for (int i = 0; i < 5000; ++i) {
    auto bytes = make_bzimage();
    for (unsigned n = random() % 4 + 1; n > 0; --n) {
      bytes[0x1f1 + random() % 0x80] = static_cast<std::byte>(random());
    }
    try {
      (void)load(bytes, memory);
    } catch (const base::Error&) {
    }
  }
}

TEST(LinuxBoot, IdentityTablesMapFourGiB) {
  std::vector<std::byte> tables(kIdentityTableBytes, std::byte{0xee});
  constexpr uint64_t kAt = 0x9000;
  fill_identity_tables(tables, kAt);
  // Walks as the processor does.
  const auto walk = [&](uint64_t address) {
    const auto entry = [&](uint64_t table, uint64_t index) {
      return load_le<uint64_t>(&tables[table - kAt + index * 8]);
    };
    const uint64_t pml4e = entry(kAt, address >> 39);
    const uint64_t pdpte = entry(pml4e & ~uint64_t{0xfff}, (address >> 30) & 511);
    const uint64_t pde = entry(pdpte & ~uint64_t{0xfff}, (address >> 21) & 511);
    EXPECT_EQ(pde & 0x83, 0x83u);
    return (pde & ~uint64_t{0x1fffff}) | (address & 0x1fffff);
  };
  for (const uint64_t address : {uint64_t{0}, uint64_t{0x200000}, uint64_t{0x3fffffff},
                                 uint64_t{0xd0000123}, uint64_t{0xffffffff}}) {
    EXPECT_EQ(walk(address), address);
  }
  EXPECT_EQ(load_le<uint64_t>(&tables[8]), 0u) << "nothing above 512 GiB";
}

TEST(LinuxBoot, PlacesTheInitrdHighButBelowItsLimit) {
  EXPECT_EQ(place_initrd(0x1000, 0x200000, 64 * kMiB, 0x7fffffff), 64 * kMiB - 0x1000);
  EXPECT_EQ(place_initrd(0x1001, 0x200000, 64 * kMiB, 0x7fffffff), 64 * kMiB - 0x2000);
  EXPECT_EQ(place_initrd(0x1000, 0x200000, 4096 * kMiB, 0x7fffffff), 0x7ffff000u);
  EXPECT_EQ(place_initrd(0x1000, 0x3fff000, 64 * kMiB, 0x7fffffff), 0x3fff000u);
  EXPECT_THROW((void)place_initrd(0x1001, 0x3fff000, 64 * kMiB, 0x7fffffff), base::Error);
  EXPECT_THROW((void)place_initrd(1, 128 * kMiB, 64 * kMiB, 0x7fffffff), base::Error);
  EXPECT_THROW((void)place_initrd(~uint64_t{0}, 0, 64 * kMiB, ~uint64_t{0} - 1), base::Error);
}

TEST(ImageReader, RefusesWhatIsNotAFile) {
  EXPECT_THROW(FileReader("/nonexistent/kernel"), base::Error);
  EXPECT_THROW(FileReader("/dev/null"), base::Error);
  EXPECT_THROW(FileReader("/"), base::Error);
}

}  // namespace
}  // namespace minivmm::vmm
