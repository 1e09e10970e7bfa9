// SPDX-License-Identifier: Apache-2.0
// A hostile kernel file against the loader: ELF entered by PVH or the Linux protocol, and bzImage.
// Found by it: crashes, sanitizer reports, accesses outside guest memory (which ends at a guard on
// both sides), errors that say nothing, and a kernel that was accepted although its command line or
// initrd did not survive the loading.
//
// The first byte chooses: bits 0 and 1 (modulo 3) the protocol (automatic, PVH, Linux), bit 2 an
// initrd, bit 3 a long command line. The kernel is the rest.
#include <string>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "virtio/guest_memory.h"
#include "vmm/layout.h"
#include "vmm/loader.h"
#include "vmm/pvh.h"

namespace minivmm::vmm {
namespace {

constexpr uint64_t kRam = uint64_t{24} << 20;  // room to unpack at 16 MiB

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Mapped once, between two pages that nothing may touch.
const virtio::GuestMemory& guest_memory() {
  static const virtio::GuestMemory memory = [] {
    constexpr size_t kGuard = 4096;
    void* const all = ::mmap(nullptr, kRam + 2 * kGuard, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) fail("no memory");
    auto* const ram = static_cast<std::byte*>(all) + kGuard;
    if (::mprotect(ram, kRam, PROT_READ | PROT_WRITE) != 0) fail("no memory");
    return virtio::GuestMemory({{0, kRam, ram}});
  }();
  return memory;
}

std::span<const std::byte> ram(uint64_t address, uint64_t length, const char* what) {
  const std::byte* const at = guest_memory().at(address, length);
  if (at == nullptr) fail(what);
  return {at, static_cast<size_t>(length)};
}

struct Told {
  uint64_t command_line;
  uint64_t initrd;
  uint64_t initrd_size;
};

// What the kernel will find at its boot data.
Told told(const BootState& state) {
  using base::load_le;
  if (state.mode == EntryMode::kProtected32) {
    const auto info = ram(state.boot_data, kPvhStartInfoBytes, "start_info is not in RAM");
    Told out{load_le<uint64_t>(&info[24]), 0, 0};
    if (load_le<uint32_t>(&info[12]) != 0) {
      const auto module = ram(load_le<uint64_t>(&info[16]), kPvhModuleBytes, "no module list");
      out.initrd = load_le<uint64_t>(&module[0]);
      out.initrd_size = load_le<uint64_t>(&module[8]);
    }
    return out;
  }
  const auto page = ram(state.boot_data, kPageSize, "the zero page is not in RAM");
  const auto split = [&](size_t low, size_t high) {
    return load_le<uint32_t>(&page[low]) | uint64_t{load_le<uint32_t>(&page[high])} << 32;
  };
  return {split(0x228, 0xc8), split(0x218, 0xc0), split(0x21c, 0xc4)};
}

void check(const BootState& state, const std::string& command_line,
           std::span<const std::byte> initrd) {
  const Told found = told(state);
  const auto text = ram(found.command_line, command_line.size() + 1, "no command line");
  if (std::memcmp(text.data(), command_line.c_str(), text.size()) != 0) {
    fail("the command line is not what was given");
  }
  if (found.initrd_size != initrd.size()) fail("the initrd has another size");
  if (initrd.empty()) return;
  const auto loaded = ram(found.initrd, found.initrd_size, "the initrd is not in RAM");
  if (!std::equal(loaded.begin(), loaded.end(), initrd.begin())) {
    fail("something was loaded over the initrd");
  }
}

void run(uint8_t choices, std::span<const std::byte> kernel) {
  const SpanReader reader("kernel", kernel);
  static const std::vector<std::byte> initrd(5000, std::byte{0x5a});
  const SpanReader initrd_reader("initrd", initrd);
  LoadRequest request;
  request.kernel = &reader;
  const bool with_initrd = (choices & 4) != 0;
  if (with_initrd) request.initrd = &initrd_reader;
  request.command_line = std::string((choices & 8) != 0 ? 3000 : 9, 'c');
  request.ram_size = kRam;
  constexpr BootProtocol kProtocols[] = {BootProtocol::kAuto, BootProtocol::kPvh,
                                         BootProtocol::kLinux64};
  request.protocol = kProtocols[(choices & 3) % 3];
  try {
    const BootState state = load_kernel(request, guest_memory());
    check(state, request.command_line,
          with_initrd ? std::span<const std::byte>(initrd) : std::span<const std::byte>());
  } catch (const base::Error& error) {
    if (std::strlen(error.what()) < 10) fail("an error that says nothing");
  }
}

}  // namespace
}  // namespace minivmm::vmm

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  minivmm::vmm::run(data[0], std::as_bytes(std::span(data + 1, size - 1)));
  return 0;
}
