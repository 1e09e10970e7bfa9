// SPDX-License-Identifier: Apache-2.0
#include "vmm/bzimage.h"

#include <errno.h>
#include <string>

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"

namespace minivmm::vmm {
namespace {

constexpr uint64_t kMagicOffset = 0x202;
constexpr uint64_t kHeaderBytes = 0x290;       // as far as any known header reaches
constexpr uint64_t kMinimumHeaderEnd = 0x264;  // init_size ends here
constexpr uint16_t kMinimumVersion = 0x20c;    // xloadflags
constexpr uint8_t kLoadedHigh = 1;
constexpr uint16_t kKernel64 = 1;

[[noreturn]] void reject(const ImageReader& image, const std::string& why) {
  throw base::Error(EINVAL, fmt::format("{}: not a usable bzImage: {}", image.name(), why));
}

}  // namespace

bool looks_like_bzimage(const ImageReader& image) {
  std::array<std::byte, 4> magic{};
  if (image.size() < kMagicOffset + magic.size()) return false;
  image.read(kMagicOffset, magic, "magic");
  return std::memcmp(magic.data(), "HdrS", magic.size()) == 0;
}

BzImage parse_bzimage(const ImageReader& image) {
  std::array<std::byte, kHeaderBytes> head{};
  const size_t have = static_cast<size_t>(std::min<uint64_t>(image.size(), head.size()));
  image.read(0, std::span(head).first(std::max<size_t>(have, kMinimumHeaderEnd)), "setup header");
  const auto u8 = [&](size_t at) { return base::load_le<uint8_t>(head.data() + at); };
  const auto u16 = [&](size_t at) { return base::load_le<uint16_t>(head.data() + at); };
  const auto u32 = [&](size_t at) { return base::load_le<uint32_t>(head.data() + at); };
  const auto u64 = [&](size_t at) { return base::load_le<uint64_t>(head.data() + at); };

  if (std::memcmp(head.data() + kMagicOffset, "HdrS", 4) != 0) reject(image, "no HdrS magic");
  const uint16_t version = u16(0x206);
  if (version < kMinimumVersion) {
    reject(image, fmt::format("boot protocol {}.{:02} is too old, 2.12 is the least", version >> 8,
                              version & 0xff));
  }
  if ((u8(0x211) & kLoadedHigh) == 0) reject(image, "a zImage, which loads below 1 MiB");
  if ((u16(0x236) & kKernel64) == 0) reject(image, "no 64-bit entry: a 32-bit kernel");

  const size_t header_end = kMagicOffset + u8(0x201);
  if (header_end < kMinimumHeaderEnd || header_end > have) {
    reject(image, fmt::format("setup header ends at {:#x}", header_end));
  }
  BzImage out;
  out.setup_header.assign(head.begin() + kSetupHeaderOffset,
                          head.begin() + static_cast<ptrdiff_t>(header_end));
  const uint64_t setup_sectors = u8(0x1f1) == 0 ? 4 : u8(0x1f1);
  out.payload_offset = (setup_sectors + 1) * 512;
  out.payload_size = uint64_t{u32(0x1f4)} * 16;
  if (out.payload_size <= kLinux64EntryOffset) reject(image, "no payload");
  // A file may be longer than its header says (a signature behind it), never shorter.
  if (out.payload_offset > image.size() || out.payload_size > image.size() - out.payload_offset) {
    reject(image, fmt::format("truncated: {} bytes, the header speaks of {}", image.size(),
                              out.payload_offset + out.payload_size));
  }
  out.preferred_address = u64(0x258);
  out.init_size = u32(0x260);
  out.command_line_max = u32(0x238);
  out.initrd_address_max = u32(0x22c);
  return out;
}

}  // namespace minivmm::vmm
