// SPDX-License-Identifier: Apache-2.0
// The qcow2 header, its extensions and the backing file's name: the first cluster of the image.
// Pure: bytes in, values out. Every size is bounded here, before anything is allocated for it, and
// an error names the field, its value and the bound.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {

// Offsets of the fields that are rewritten in place. Those from the size to the autoclear bits (in
// version 2: to the snapshots) lie in one sector.
inline constexpr uint64_t kSizeField = 24;
inline constexpr uint64_t kNumbersEndV2 = 72;
inline constexpr uint64_t kNumbersEndV3 = 96;
inline constexpr uint64_t kRefcountTableField = 48;  // 8 bytes, then 4 of clusters
inline constexpr uint64_t kIncompatibleField = 72;
inline constexpr uint64_t kAutoclearField = 88;
inline constexpr uint64_t kRefcountOrderField = 96;

// Types of header extensions.
inline constexpr uint32_t kExtEnd = 0;
inline constexpr uint32_t kExtBackingFormat = 0xe2792aca;
inline constexpr uint32_t kExtFeatureNames = 0x6803f857;
inline constexpr uint32_t kExtBitmaps = 0x23852875;
inline constexpr uint32_t kExtLuks = 0x0537be77;
inline constexpr uint32_t kExtDataFile = 0x44415441;
inline constexpr size_t kFeatureNameBytes = 48;

struct HeaderExtension {
  uint32_t type = 0;
  std::vector<std::byte> data;
};

struct BitmapsExtension {
  uint32_t count = 0;
  uint64_t directory_size = 0;
  uint64_t directory_offset = 0;
};

// Where the LUKS header of an encrypted image lies, with its key material.
struct LuksExtension {
  uint64_t offset = 0;
  uint64_t length = 0;
};

// Values of crypt_method.
inline constexpr uint32_t kCryptNone = 0;
inline constexpr uint32_t kCryptAes = 1;
inline constexpr uint32_t kCryptLuks = 2;

struct FeatureName {
  uint8_t type = 0;  // 0 incompatible, 1 compatible, 2 autoclear
  uint8_t bit = 0;
  std::string name;
};

struct Header {
  unsigned version = 3;
  unsigned cluster_bits = 16;
  uint64_t size = 0;
  uint32_t crypt_method = 0;
  uint32_t l1_size = 0;  // entries
  uint64_t l1_offset = 0;
  uint64_t refcount_table_offset = 0;
  uint32_t refcount_table_clusters = 0;
  uint32_t snapshots = 0;
  uint64_t snapshots_offset = 0;
  uint64_t incompatible = 0;
  uint64_t compatible = 0;
  uint64_t autoclear = 0;
  unsigned refcount_order = 4;
  uint32_t header_length = 112;
  Compression compression = Compression::kZlib;
  std::vector<std::byte> more_fields;  // bytes 105 to header_length, kept as they are

  bool has_backing = false;
  std::string backing_file;
  std::string backing_format;
  std::string data_file;
  std::optional<LuksExtension> luks;        // with crypt_method 2, always
  std::optional<BitmapsExtension> bitmaps;  // only where the autoclear bit vouches for it
  std::vector<FeatureName> feature_names;
  std::vector<HeaderExtension> unknown_extensions;

  Geometry geometry() const noexcept {
    return {cluster_bits, refcount_order, version, (incompatible & kIncompatExtendedL2) != 0,
            (incompatible & kIncompatDataFile) != 0};
  }
  // The data file is a raw image by itself: its content is the guest's, whatever the tables say.
  bool raw_data() const noexcept {
    return geometry().external_data && (autoclear & kAutoclearRawData) != 0;
  }
  uint64_t refcount_table_bytes() const noexcept {
    return uint64_t{refcount_table_clusters} << cluster_bits;
  }
};

// True if the bytes begin like a qcow2 image (of any version).
bool has_magic(std::span<const std::byte> bytes) noexcept;

// The size of the first cluster, which is what parse_header needs (or the whole file where that is
// shorter). `bytes` holds at least the first 24 bytes of the file. Throws EINVAL.
uint64_t first_cluster_size(std::span<const std::byte> bytes);

// Throws EINVAL naming the field. What is well-formed but not supported passes: see
// require_supported.
Header parse_header(std::span<const std::byte> first_cluster, uint64_t file_size);

// Throws ENOTSUP naming the feature that this driver cannot handle.
void require_supported(const Header& header);

// The fixed fields alone: header_length bytes, without the place of the backing file's name.
std::vector<std::byte> serialise_fields(const Header& header);

// The first cluster's content up to the end of the backing file's name. Throws EINVAL if it does
// not fit the cluster. The feature name table is left out where there is no room for it. `name_at`:
// where the name is to be, if there is room; 0: behind the extensions.
std::vector<std::byte> serialise_header(const Header& header, uint64_t name_at = 0);

}  // namespace minivmm::block::qcow2
