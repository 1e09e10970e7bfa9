// SPDX-License-Identifier: Apache-2.0
// serialise_header: the inverse of parse_header.
#include <string_view>

#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"
#include "block/formats/qcow2/header.h"

namespace minivmm::block::qcow2 {
namespace {

using Bytes = std::vector<std::byte>;

template <typename T>
void put(Bytes& out, T value) {
  const size_t at = out.size();
  out.resize(at + sizeof value);
  base::store_be(out.data() + at, value);
}

void put_text(Bytes& out, std::string_view text) {
  for (const char c : text) out.push_back(static_cast<std::byte>(c));
}

void put_extension(Bytes& out, uint32_t type, const Bytes& data) {
  put(out, type);
  put(out, static_cast<uint32_t>(data.size()));
  out.insert(out.end(), data.begin(), data.end());
  out.resize((out.size() + 7) & ~size_t{7});
}

void put_text_extension(Bytes& out, uint32_t type, std::string_view text) {
  if (text.empty()) return;
  Bytes data;
  put_text(data, text);
  put_extension(out, type, data);
}

Bytes feature_table(const Header& h) {
  Bytes out;
  for (const FeatureName& f : h.feature_names) {
    const size_t at = out.size();
    out.push_back(static_cast<std::byte>(f.type));
    out.push_back(static_cast<std::byte>(f.bit));
    put_text(out, std::string_view(f.name).substr(0, kFeatureNameBytes - 2));
    out.resize(at + kFeatureNameBytes);
  }
  return out;
}

Bytes bitmaps_data(const BitmapsExtension& e) {
  Bytes out;
  put(out, e.count);
  put(out, uint32_t{0});
  put(out, e.directory_size);
  put(out, e.directory_offset);
  return out;
}

Bytes luks_data(const LuksExtension& e) {
  Bytes out;
  put(out, e.offset);
  put(out, e.length);
  return out;
}

}  // namespace

std::vector<std::byte> serialise_fields(const Header& h) {
  Bytes out;
  put(out, kMagic);
  put(out, static_cast<uint32_t>(h.version));
  put(out, uint64_t{0});  // the backing file's name: filled in when its place is known
  put(out, uint32_t{0});
  put(out, static_cast<uint32_t>(h.cluster_bits));
  put(out, h.size);
  put(out, h.crypt_method);
  put(out, h.l1_size);
  put(out, h.l1_offset);
  put(out, h.refcount_table_offset);
  put(out, h.refcount_table_clusters);
  put(out, h.snapshots);
  put(out, h.snapshots_offset);
  if (h.version < 3) return out;
  put(out, h.incompatible);
  put(out, h.compatible);
  put(out, h.autoclear);
  put(out, static_cast<uint32_t>(h.refcount_order));
  put(out, h.header_length);
  if (h.header_length > 104) put(out, static_cast<uint8_t>(h.compression));
  out.insert(out.end(), h.more_fields.begin(), h.more_fields.end());
  out.resize(h.header_length);
  return out;
}

std::vector<std::byte> serialise_header(const Header& h, uint64_t name_at) {
  const uint64_t cluster = 1ULL << h.cluster_bits;
  Bytes out = serialise_fields(h);
  put_text_extension(out, kExtBackingFormat, h.backing_format);
  put_text_extension(out, kExtDataFile, h.data_file);
  if (h.luks) put_extension(out, kExtLuks, luks_data(*h.luks));
  // In QEMU's order: bitmaps, which come and go, move nothing but the name.
  Bytes rest;
  if (h.bitmaps) put_extension(rest, kExtBitmaps, bitmaps_data(*h.bitmaps));
  for (const HeaderExtension& e : h.unknown_extensions) put_extension(rest, e.type, e.data);
  const size_t tail = rest.size() + 8 + h.backing_file.size();  // the end marker and the name
  if (h.version >= 3 && !h.feature_names.empty() &&
      out.size() + 8 + h.feature_names.size() * kFeatureNameBytes + tail <= cluster) {
    put_extension(out, kExtFeatureNames, feature_table(h));
  }
  out.insert(out.end(), rest.begin(), rest.end());
  put(out, uint64_t{0});
  if (h.has_backing) {
    if (name_at > out.size()) out.resize(name_at);
    base::store_be(out.data() + 8, static_cast<uint64_t>(out.size()));
    base::store_be(out.data() + 16, static_cast<uint32_t>(h.backing_file.size()));
    put_text(out, h.backing_file);
  }
  if (out.size() > cluster) {
    throw base::Error(EINVAL, fmt::format("qcow2 header: {} bytes with the backing file's name do "
                                          "not fit a cluster of {}; use a larger cluster_size",
                                          out.size(), cluster));
  }
  return out;
}

}  // namespace minivmm::block::qcow2
