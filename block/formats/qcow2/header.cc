// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/header.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"
#include "block/graph/types.h"

namespace minivmm::block::qcow2 {
namespace {

using base::Error;
using base::load_be;

constexpr uint32_t kLengthV2 = 72;
constexpr uint32_t kMinLengthV3 = 104;

template <typename... Args>
[[noreturn]] void bad(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(EINVAL, "qcow2 header: " + fmt::format(format, std::forward<Args>(args)...));
}

std::string text_of(std::span<const std::byte> bytes) {
  // SAFETY: bytes as characters.
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void parse_fixed(std::span<const std::byte> b, Header& h) {
  const std::byte* p = b.data();
  h.version = load_be<uint32_t>(p + 4);
  h.cluster_bits = load_be<uint32_t>(p + 20);
  h.size = load_be<uint64_t>(p + 24);
  h.crypt_method = load_be<uint32_t>(p + 32);
  h.l1_size = load_be<uint32_t>(p + 36);
  h.l1_offset = load_be<uint64_t>(p + 40);
  h.refcount_table_offset = load_be<uint64_t>(p + 48);
  h.refcount_table_clusters = load_be<uint32_t>(p + 56);
  h.snapshots = load_be<uint32_t>(p + 60);
  h.snapshots_offset = load_be<uint64_t>(p + 64);
}

void parse_version3(std::span<const std::byte> b, Header& h) {
  if (b.size() < kMinLengthV3) bad("the file of {} bytes is shorter than the header", b.size());
  const std::byte* p = b.data();
  h.incompatible = load_be<uint64_t>(p + 72);
  h.compatible = load_be<uint64_t>(p + 80);
  h.autoclear = load_be<uint64_t>(p + 88);
  h.refcount_order = load_be<uint32_t>(p + 96);
  h.header_length = load_be<uint32_t>(p + 100);
  if (h.refcount_order > kMaxRefcountOrder) {
    bad("refcount_order {} is above {} (64-bit refcounts)", h.refcount_order, kMaxRefcountOrder);
  }
  if (h.header_length < kMinLengthV3 || h.header_length % 8 != 0 ||
      h.header_length > (1ULL << h.cluster_bits)) {
    bad("header_length {} is not a multiple of 8 from {} to the cluster size", h.header_length,
        kMinLengthV3);
  }
  if (h.header_length > b.size()) {
    bad("header_length {} reaches past the end of the file ({} bytes)", h.header_length, b.size());
  }
  if ((h.incompatible & kIncompatExtendedL2) != 0 && h.cluster_bits < kMinExtendedClusterBits) {
    bad("cluster_bits {} is below {} (16 KiB), which extended L2 entries need", h.cluster_bits,
        kMinExtendedClusterBits);
  }
  const unsigned type = h.header_length > 104 ? static_cast<unsigned>(p[104]) : 0;
  if (((h.incompatible & kIncompatCompression) != 0) != (type != 0)) {
    bad("compression_type {} contradicts the compression type bit", type);
  }
  if (type > 1) bad("compression_type {} is unknown (0 is zlib, 1 zstd)", type);
  h.compression = static_cast<Compression>(type);
  if (h.header_length > 105) {
    h.more_fields.assign(p + 105, p + h.header_length);
  }
}

void parse_feature_names(std::span<const std::byte> data, Header& h) {
  for (; data.size() >= kFeatureNameBytes; data = data.subspan(kFeatureNameBytes)) {
    FeatureName f;
    f.type = static_cast<uint8_t>(data[0]);
    f.bit = static_cast<uint8_t>(data[1]);
    f.name = text_of(data.subspan(2, kFeatureNameBytes - 2));
    f.name.resize(std::strlen(f.name.c_str()));
    h.feature_names.push_back(std::move(f));
  }
}

void parse_bitmaps(std::span<const std::byte> data, Header& h, uint64_t file_size) {
  // Without the bit the bitmaps are out of date: what the extension points to may be anything by
  // now. It is kept and not looked at.
  if ((h.autoclear & kAutoclearBitmaps) == 0) {
    h.unknown_extensions.push_back({kExtBitmaps, {data.begin(), data.end()}});
    return;
  }
  if (data.size() != 24) bad("the bitmaps extension has {} bytes, not 24", data.size());
  BitmapsExtension e;
  e.count = load_be<uint32_t>(data.data());
  e.directory_size = load_be<uint64_t>(data.data() + 8);
  e.directory_offset = load_be<uint64_t>(data.data() + 16);
  if (e.count == 0) bad("the bitmaps extension names no bitmap");
  if (e.count > 65535) bad("the bitmaps extension names {} bitmaps, above 65535", e.count);
  if (h.geometry().offset_in_cluster(e.directory_offset) != 0 || e.directory_offset == 0 ||
      !base::range_fits(e.directory_offset, e.directory_size, file_size)) {
    bad("the bitmap directory at {:#x} ({} bytes) is misaligned or past the end of the file",
        e.directory_offset, e.directory_size);
  }
  h.bitmaps = e;
}

void parse_luks(std::span<const std::byte> data, Header& h, uint64_t file_size) {
  if (h.luks) bad("the encryption extension appears twice");
  if (h.crypt_method != kCryptLuks) {
    bad("there is an encryption extension, and crypt_method is {}", h.crypt_method);
  }
  if (data.size() != 16) bad("the encryption extension has {} bytes, not 16", data.size());
  LuksExtension e;
  e.offset = load_be<uint64_t>(data.data());
  e.length = load_be<uint64_t>(data.data() + 8);
  if (h.geometry().offset_in_cluster(e.offset) != 0 || e.offset == 0 || e.length == 0 ||
      !base::range_fits(e.offset, e.length, file_size)) {
    bad("the LUKS header at {:#x} ({} bytes) is misaligned, empty or past the end of the file",
        e.offset, e.length);
  }
  h.luks = e;
}

void take_extension(uint32_t type, std::span<const std::byte> data, Header& h, uint64_t file_size) {
  switch (type) {
    case kExtBackingFormat:
      h.backing_format = text_of(data);
      break;
    case kExtFeatureNames:
      parse_feature_names(data, h);
      break;
    case kExtBitmaps:
      if (h.bitmaps) bad("the bitmaps extension appears twice");
      parse_bitmaps(data, h, file_size);
      break;
    case kExtLuks:
      parse_luks(data, h, file_size);
      break;
    case kExtDataFile:
      h.data_file = text_of(data);
      break;
    default:
      h.unknown_extensions.push_back({type, {data.begin(), data.end()}});
  }
}

void parse_extensions(std::span<const std::byte> b, uint64_t end, Header& h, uint64_t file_size) {
  uint64_t at = h.header_length;
  const uint64_t limit = end < b.size() ? end : b.size();
  while (limit - at >= 8) {
    const uint32_t type = load_be<uint32_t>(b.data() + at);
    const uint32_t length = load_be<uint32_t>(b.data() + at + 4);
    if (type == kExtEnd) return;
    at += 8;
    if (length > limit - at) {
      bad("extension {:#x} at {:#x} has {} bytes, past the end of the header area ({:#x})", type,
          at - 8, length, limit);
    }
    take_extension(type, b.subspan(at, length), h, file_size);
    at += base::align_up<uint64_t>(length, 8);
    if (at > limit) return;
  }
}

// Returns where the extension area ends.
uint64_t parse_backing(std::span<const std::byte> b, Header& h) {
  const uint64_t offset = load_be<uint64_t>(b.data() + 8);
  const uint32_t length = load_be<uint32_t>(b.data() + 16);
  const uint64_t cluster = 1ULL << h.cluster_bits;
  if (offset == 0) return cluster;
  if (length > kMaxBackingNameBytes) {
    bad("the backing file's name has {} bytes, above {}", length, kMaxBackingNameBytes);
  }
  if (offset < h.header_length || !base::range_fits(offset, length, cluster) ||
      !base::range_fits(offset, length, b.size())) {
    bad("the backing file's name at {:#x} ({} bytes) is not inside the first cluster", offset,
        length);
  }
  h.has_backing = length != 0;
  h.backing_file = text_of(b.subspan(offset, length));
  if (h.backing_file.find('\0') != std::string::npos) {
    bad("the backing file's name contains a zero byte");
  }
  return offset;
}

void check_table(const char* what, uint64_t offset, uint64_t bytes, const Header& h,
                 uint64_t file_size) {
  if (h.geometry().offset_in_cluster(offset) != 0) {
    bad("the {} offset {:#x} is not aligned to the cluster size", what, offset);
  }
  if (offset == 0) bad("the {} lies in the header", what);
  if (!base::range_fits(offset, bytes, file_size)) {
    bad("the {} at {:#x} ({} bytes) reaches past the end of the file ({} bytes)", what, offset,
        bytes, file_size);
  }
}

void check_tables(const Header& h, uint64_t file_size) {
  const uint64_t l1_bytes = uint64_t{h.l1_size} * 8;
  if (l1_bytes > kMaxL1Bytes) {
    bad("l1_size {} is above {} entries (32 MiB)", h.l1_size, kMaxL1Bytes / 8);
  }
  if (h.size > kMaxDiskSize) bad("the disk size {} is above {}", h.size, kMaxDiskSize);
  const uint64_t covered =
      h.geometry().l1_shift() >= 63 ? ~uint64_t{0} : uint64_t{h.l1_size} << h.geometry().l1_shift();
  if (covered < h.size) {
    bad("l1_size {} is too small for a disk of {} bytes", h.l1_size, h.size);
  }
  if (h.l1_size != 0) check_table("L1 table", h.l1_offset, l1_bytes, h, file_size);
  if (h.refcount_table_clusters == 0) bad("there is no refcount table");
  if (h.refcount_table_bytes() > kMaxRefcountTableBytes) {
    bad("refcount_table_clusters {} is above {} (8 MiB)", h.refcount_table_clusters,
        kMaxRefcountTableBytes >> h.cluster_bits);
  }
  check_table("refcount table", h.refcount_table_offset, h.refcount_table_bytes(), h, file_size);
  if (h.l1_size != 0 && h.l1_offset < h.refcount_table_offset + h.refcount_table_bytes() &&
      h.refcount_table_offset < h.l1_offset + l1_bytes) {
    bad("the L1 table at {:#x} overlaps the refcount table at {:#x}", h.l1_offset,
        h.refcount_table_offset);
  }
  if (h.snapshots > kMaxSnapshots) bad("nb_snapshots {} is above {}", h.snapshots, kMaxSnapshots);
  if (h.snapshots != 0) {
    check_table("snapshot table", h.snapshots_offset, uint64_t{h.snapshots} * 40, h, file_size);
  }
}

void check_external_data(const Header& h) {
  if (h.snapshots != 0) bad("there are internal snapshots beside an external data file");
  if (h.data_file.find('\0') != std::string::npos) {
    bad("the data file's name contains a zero byte");
  }
  if (h.data_file.size() > kMaxBackingNameBytes) {
    bad("the data file's name has {} bytes, above {}", h.data_file.size(), kMaxBackingNameBytes);
  }
  if (h.raw_data() && h.has_backing) bad("a raw data file and a backing file exclude each other");
}

std::string feature_name(const Header& h, unsigned bit) {
  for (const FeatureName& f : h.feature_names) {
    if (f.type == 0 && f.bit == bit && !f.name.empty()) return fmt::format("'{}'", f.name);
  }
  return fmt::format("number {}", bit);
}

}  // namespace

bool has_magic(std::span<const std::byte> bytes) noexcept {
  return bytes.size() >= 4 && load_be<uint32_t>(bytes.data()) == kMagic;
}

uint64_t first_cluster_size(std::span<const std::byte> b) {
  if (!has_magic(b)) throw Error(EINVAL, "not a qcow2 image: the magic number is missing");
  if (b.size() < 24) bad("the file of {} bytes is shorter than the header", b.size());
  const uint32_t version = load_be<uint32_t>(b.data() + 4);
  if (version != 2 && version != 3) bad("version {} is unknown (2 and 3 are)", version);
  const uint32_t bits = load_be<uint32_t>(b.data() + 20);
  if (bits < kMinClusterBits || bits > kMaxClusterBits) {
    bad("cluster_bits {} is outside {} (512 bytes) to {} (2 MiB)", bits, kMinClusterBits,
        kMaxClusterBits);
  }
  return 1ULL << bits;
}

Header parse_header(std::span<const std::byte> b, uint64_t file_size) {
  first_cluster_size(b);
  if (b.size() < kLengthV2) bad("the file of {} bytes is shorter than the header", b.size());
  Header h;
  parse_fixed(b, h);
  h.header_length = kLengthV2;
  if (h.version >= 3) parse_version3(b, h);
  if (h.crypt_method > 2) bad("crypt_method {} is unknown", h.crypt_method);
  const uint64_t extensions_end = parse_backing(b, h);
  parse_extensions(b, extensions_end, h, file_size);
  if ((h.autoclear & kAutoclearBitmaps) != 0 && !h.bitmaps) {
    bad("the bitmaps bit is set and the bitmaps extension is missing");
  }
  if (h.crypt_method == kCryptLuks && !h.luks) {
    bad("crypt_method is 2 (LUKS) and the encryption extension is missing");
  }
  if (h.crypt_method != kCryptNone && h.size % 512 != 0) {
    bad("the disk size {} of an encrypted image is odd", h.size);
  }
  check_tables(h, file_size);
  if (h.geometry().external_data) check_external_data(h);
  return h;
}

void require_supported(const Header& h) {
  if (const uint64_t unknown = h.incompatible & ~kIncompatKnown; unknown != 0) {
    const auto bit = static_cast<unsigned>(std::countr_zero(unknown));
    throw Error(ENOTSUP, fmt::format("the image uses the incompatible feature {}, which this "
                                     "program does not know",
                                     feature_name(h, bit)));
  }
}

}  // namespace minivmm::block::qcow2
