// SPDX-License-Identifier: Apache-2.0
#include "vmm/emulate/paging.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace minivmm::vmm::emulate {
namespace {

constexpr uint64_t kPresent = 1 << 0;
constexpr uint64_t kWritable = 1 << 1;
constexpr uint64_t kUser = 1 << 2;
constexpr uint64_t kAccessed = 1 << 5;
constexpr uint64_t kDirty = 1 << 6;
constexpr uint64_t kLarge = 1 << 7;
constexpr uint64_t kAddress = 0x000ffffffffff000;
constexpr uint64_t kCr0WriteProtect = 1 << 16;
constexpr uint64_t kCr4Smap = 1 << 21;
constexpr uint64_t kCr4La57 = 1 << 12;
constexpr uint64_t kRflagsAc = 1 << 18;
constexpr uint64_t kPage = 4096;

}  // namespace

void Paging::fault(uint64_t address, Access access, bool present) const {
  const uint32_t code = (present ? 1u : 0u) | (access == Access::kWrite ? 2u : 0u) |
                        (user() && access != Access::kSystemRead ? 4u : 0u);
  throw Exception{kPageFaultVector, code, address};
}

// `rights`: the flags that all levels have in common.
bool Paging::allowed(uint64_t rights, Access access) const {
  if (access == Access::kSystemRead) return true;
  if (user()) {
    return (rights & kUser) != 0 && (access == Access::kRead || (rights & kWritable) != 0);
  }
  const bool user_page = (rights & kUser) != 0;
  if (user_page && (sregs_.cr4 & kCr4Smap) != 0 && (regs_.rflags & kRflagsAc) == 0) return false;
  return access == Access::kRead || (rights & kWritable) != 0 ||
         (sregs_.cr0 & kCr0WriteProtect) == 0;
}

std::byte* Paging::translate(uint64_t address, size_t length, Access access) const {
  const unsigned levels = (sregs_.cr4 & kCr4La57) != 0 ? 5 : 4;
  const unsigned unused = 64 - (9 * levels + 12);
  if (static_cast<uint64_t>(static_cast<int64_t>(address << unused) >> unused) != address) {
    throw Exception{kProtectionVector, 0, 0};
  }
  uint64_t rights = kWritable | kUser;
  uint64_t table = sregs_.cr3 & kAddress;
  for (unsigned level = levels; level > 0; --level) {
    const unsigned shift = 12 + 9 * (level - 1);
    std::byte* const at = memory_.at(table + ((address >> shift) & 511) * 8, 8);
    if (at == nullptr) throw NotRam{};
    // SAFETY: eight aligned bytes of guest memory, which other vCPUs may change at once.
    std::atomic_ref entry(*reinterpret_cast<uint64_t*>(at));
    const uint64_t value = entry.load(std::memory_order_acquire);
    if ((value & kPresent) == 0) fault(address, access, false);
    rights &= value;
    const bool leaf = level == 1 || (level <= 3 && (value & kLarge) != 0);
    if (leaf && !allowed(rights, access)) fault(address, access, true);
    const uint64_t mark = kAccessed | (leaf && access == Access::kWrite ? kDirty : 0);
    if ((value & mark) != mark) entry.fetch_or(mark, std::memory_order_acq_rel);
    if (leaf) {
      const uint64_t page = uint64_t{1} << shift;
      std::byte* const host =
          memory_.at((value & kAddress & ~(page - 1)) | (address & (page - 1)), length);
      if (host == nullptr) throw NotRam{};
      return host;
    }
    table = value & kAddress;
  }
  throw NotRam{};  // not reached: level 1 is a leaf
}

void Paging::read(uint64_t address, std::span<std::byte> out) const {
  while (!out.empty()) {
    const size_t part = std::min<size_t>(out.size(), kPage - address % kPage);
    std::memcpy(out.data(), translate(address, part, Access::kRead), part);
    out = out.subspan(part);
    address += part;
  }
}

void Paging::read_as_system(uint64_t address, std::span<std::byte> out) const {
  while (!out.empty()) {
    const size_t part = std::min<size_t>(out.size(), kPage - address % kPage);
    std::memcpy(out.data(), translate(address, part, Access::kSystemRead), part);
    out = out.subspan(part);
    address += part;
  }
}

void Paging::write(uint64_t address, std::span<const std::byte> data) const {
  while (!data.empty()) {
    const size_t part = std::min<size_t>(data.size(), kPage - address % kPage);
    std::memcpy(translate(address, part, Access::kWrite), data.data(), part);
    data = data.subspan(part);
    address += part;
  }
}

std::byte* Paging::writable(uint64_t address, size_t length) const {
  return translate(address, length, Access::kWrite);
}

}  // namespace minivmm::vmm::emulate
