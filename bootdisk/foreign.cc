// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/foreign.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <vector>

namespace minivmm::bootdisk {
namespace {

struct Signature {
  size_t offset;
  std::string_view magic;
  std::string_view name;
};

constexpr uint64_t kBtrfsOffset = 0x10040;
constexpr std::string_view kBtrfsMagic = "_BHRfS_M";
constexpr std::string_view kLvm = "an LVM physical volume";
constexpr Signature kSignatures[] = {
    {0, "XFSB", "XFS"},
    // Its label may stand in any of the first four sectors.
    {0, "LABELONE", kLvm},
    {512, "LABELONE", kLvm},
    {1024, "LABELONE", kLvm},
    {1536, "LABELONE", kLvm},
    {0, "LUKS\xba\xbe", "encrypted (LUKS)"},
    {1024, "\x10\x20\xf5\xf2", "F2FS"},
    {4096, "\xfc\x4e\x2b\xa9", "a member of a Linux RAID"},
    {0, "\xfc\x4e\x2b\xa9", "a member of a Linux RAID"},
    {3, "NTFS    ", "NTFS"},
};

}  // namespace

// In two reads: the disk may be far away.
std::string_view foreign_content(ByteSource& disk, const Volume& volume) noexcept {
  constexpr size_t kHead = 4100;  // as far as all but one of them reach
  const auto read = [&](uint64_t offset, std::span<char> out) {
    disk.read(volume.offset + offset, std::as_writable_bytes(out));
  };
  try {
    std::vector<char> head(kHead);
    const size_t length = std::min<uint64_t>(volume.length, head.size());
    read(0, std::span(head).first(length));
    for (const Signature& each : kSignatures) {
      if (std::string_view(&head[each.offset], each.magic.size()) == each.magic) return each.name;
    }
    std::array<char, kBtrfsMagic.size()> magic{};
    if (volume.length < kBtrfsOffset + magic.size()) return {};
    read(kBtrfsOffset, magic);
    if (std::string_view(magic.data(), magic.size()) == kBtrfsMagic) return "btrfs";
  } catch (const std::exception&) {
    // What cannot be read has no name.
  }
  return {};
}

}  // namespace minivmm::bootdisk
