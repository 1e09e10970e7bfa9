// SPDX-License-Identifier: Apache-2.0
// A new image, in this order: header, refcount table, refcount blocks, L1 table, LUKS header; with
// preallocated metadata also all L2 tables and room for all data. Every cluster has refcount 1. The
// header is written last.
#include "block/formats/qcow2/create.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"
#include "block/crypto/secret.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/l2_entry.h"
#include "block/formats/qcow2/refcount_codec.h"

namespace minivmm::block::qcow2 {
namespace {

using base::Error;

// Where everything lies, in clusters.
struct Layout {
  Geometry geometry;
  bool raw_data = false;
  uint64_t table_clusters = 1;
  uint64_t blocks = 1;
  uint64_t l1_entries = 1;
  uint64_t l1_clusters = 1;
  uint64_t luks_clusters = 0;
  uint64_t l2_tables = 0;
  uint64_t mapped = 0;  // guest clusters that have an entry
  uint64_t data = 0;    // and those that lie in the image

  uint64_t table() const noexcept { return 1; }
  uint64_t first_block() const noexcept { return table() + table_clusters; }
  uint64_t l1() const noexcept { return first_block() + blocks; }
  uint64_t luks() const noexcept { return l1() + l1_clusters; }
  uint64_t first_l2() const noexcept { return luks() + luks_clusters; }
  uint64_t first_data() const noexcept { return first_l2() + l2_tables; }
  uint64_t total() const noexcept { return first_data() + data; }
};

Layout lay_out(const CreateOptions& options) {
  Layout out;
  out.geometry = options.geometry();
  out.raw_data = options.data_file_raw;
  const Geometry& g = out.geometry;
  const uint64_t clusters = g.clusters(options.size);
  out.l1_entries = std::max<uint64_t>(1, base::div_ceil(clusters, g.l2_entries()));
  out.l1_clusters = g.clusters(out.l1_entries * 8);
  if (options.luks) out.luks_clusters = g.clusters(crypto::luks1_header_bytes(*options.luks));
  // A raw data file holds everything from the beginning.
  if (options.preallocation != Preallocation::kOff || options.data_file_raw) {
    out.l2_tables = base::div_ceil(clusters, g.l2_entries());
    out.mapped = clusters;
    out.data = g.external_data ? 0 : clusters;
  }
  // More blocks need more blocks; this settles after a few rounds.
  for (uint64_t before = 0; before != out.total();) {
    before = out.total();
    out.blocks = base::div_ceil(out.total(), g.block_entries());
    out.table_clusters = g.clusters(out.blocks * 8);
  }
  return out;
}

Header make_header(const CreateOptions& options, const Layout& layout) {
  const unsigned bits = options.cluster_bits;
  Header h;
  h.version = options.version;
  h.cluster_bits = bits;
  h.size = options.size;
  h.l1_size = static_cast<uint32_t>(layout.l1_entries);
  h.l1_offset = layout.l1() << bits;
  h.refcount_table_offset = layout.table() << bits;
  h.refcount_table_clusters = static_cast<uint32_t>(layout.table_clusters);
  h.refcount_order = options.refcount_order;
  h.has_backing = !options.backing_file.empty();
  h.backing_file = options.backing_file;
  h.backing_format = options.backing_format;
  if (options.luks) {
    h.crypt_method = kCryptLuks;
    h.luks = LuksExtension{layout.luks() << bits, crypto::luks1_header_bytes(*options.luks)};
  }
  if (!options.aes_secret.empty()) h.crypt_method = kCryptAes;
  if (options.version < 3) {
    h.header_length = 72;
    return h;
  }
  h.compression = options.compression;
  if (options.compression != Compression::kZlib) h.incompatible |= kIncompatCompression;
  if (!options.data_file.empty()) h.incompatible |= kIncompatDataFile;
  if (options.data_file_raw) h.autoclear |= kAutoclearRawData;
  h.data_file = options.data_file;
  if (options.extended_l2) h.incompatible |= kIncompatExtendedL2;
  if (options.lazy_refcounts) h.compatible |= kCompatLazyRefcounts;
  h.feature_names = known_features();
  return h;
}

void write_at(Edge& file, uint64_t offset, base::Buffer& bytes) { file.write(offset, bytes.io()); }

void write_refcounts(Edge& file, const Layout& layout) {
  const Geometry& g = layout.geometry;
  base::Buffer table = base::Buffer::zeroed(layout.table_clusters << g.cluster_bits);
  base::Buffer block(g.cluster_size());
  for (uint64_t i = 0; i < layout.blocks; ++i) {
    const uint64_t offset = (layout.first_block() + i) << g.cluster_bits;
    base::store_be(table.data() + i * 8, offset);
    std::fill_n(block.data(), block.size(), std::byte{0});
    const uint64_t used = std::min(g.block_entries(), layout.total() - i * g.block_entries());
    for (uint64_t k = 0; k < used; ++k) set_refcount(block.data(), k, g.refcount_order, 1);
    write_at(file, offset, block);
  }
  write_at(file, layout.table() << g.cluster_bits, table);
}

void write_tables(Edge& file, const Layout& layout) {
  const Geometry& g = layout.geometry;
  base::Buffer l1 = base::Buffer::zeroed(layout.l1_clusters << g.cluster_bits);
  base::Buffer l2(g.cluster_size());
  for (uint64_t i = 0; i < layout.l2_tables; ++i) {
    const uint64_t offset = (layout.first_l2() + i) << g.cluster_bits;
    base::store_be(l1.data() + i * 8, offset | kFlagCopied);
    std::fill_n(l2.data(), l2.size(), std::byte{0});
    const uint64_t first = i * g.l2_entries();
    const uint64_t used = std::min(g.l2_entries(), layout.mapped - first);
    for (uint64_t k = 0; k < used; ++k) {
      const uint64_t place = g.external_data ? first + k : layout.first_data() + first + k;
      // With subclusters: reserved, and not allocated, so that a backing file is still seen. A raw
      // data file is all that is seen.
      const uint64_t bitmap = g.extended_l2 && layout.raw_data ? g.all_subclusters() : 0;
      store_l2(l2.data() + k * g.l2_entry_bytes(), {place << g.cluster_bits | kFlagCopied, bitmap},
               g);
    }
    write_at(file, offset, l2);
  }
  write_at(file, layout.l1() << g.cluster_bits, l1);
}

// What was in the file is gone; where the size is fixed (a device), its old content stays, except
// for the header.
void empty_file(Edge& file) {
  try {
    file.truncate(0);
  } catch (const Error& e) {
    if (e.err() != ENOTSUP && e.err() != EINVAL) throw;
    base::Buffer zeroes = base::Buffer::zeroed(4096);
    file.write(0, zeroes.io());
  }
}

// The range of the file reads as zeroes.
void take_blocks(Edge& file, uint64_t start, uint64_t end, Preallocation how) {
  if (how == Preallocation::kFalloc || how == Preallocation::kFull) {
    file.preallocate(start, end - start, how);
  }
}

void reserve_data(Edge& file, const Layout& layout, Preallocation how) {
  if (layout.data == 0) return;
  const unsigned bits = layout.geometry.cluster_bits;
  const uint64_t start = layout.first_data() << bits;
  const uint64_t end = layout.total() << bits;
  if (file.size() > start) {
    file.write_zeroes(start, std::min(end, file.size()) - start, {.may_unmap = true});
  }
  if (file.size() < end) file.truncate(end);
  take_blocks(file, start, end, how);
}

void write_luks_header(Edge& file, const Layout& layout, const crypto::Luks1CreateOptions& luks) {
  const unsigned bits = layout.geometry.cluster_bits;
  base::Buffer zeroes = base::Buffer::zeroed(layout.geometry.cluster_size());
  for (uint64_t i = 0; i < layout.luks_clusters; ++i) {
    write_at(file, (layout.luks() + i) << bits, zeroes);
  }
  crypto::LuksArea area(file, layout.luks() << bits, crypto::luks1_header_bytes(luks));
  (void)crypto::create_luks1(area, luks);
}

// The external data file: empty, and of the disk's size. A device has to be large enough.
void prepare_data_file(Edge& data, uint64_t size, Preallocation how) {
  try {
    data.truncate(0);
    data.truncate(size);
  } catch (const Error& e) {
    if (e.err() != ENOTSUP && e.err() != EINVAL) throw;
    if (data.size() < size) {
      throw Error(ENOSPC, fmt::format("The data file has {} bytes, fewer than the {} of the disk",
                                      data.size(), size));
    }
    if (size != 0) data.write_zeroes(0, size, {.may_unmap = true});
  }
  take_blocks(data, 0, size, how);
  data.flush();
}

unsigned bits_of(uint64_t value, const char* message) {
  if (!std::has_single_bit(value)) throw Error(EINVAL, message);
  return static_cast<unsigned>(std::countr_zero(value));
}

constexpr const char* kClusterSizeText =
    "Cluster size must be a power of two between 512 and 2048k";
constexpr const char* kRefcountText =
    "Refcount width must be a power of two and may not exceed 64 bits";

}  // namespace

std::vector<FeatureName> known_features() {
  return {{0, 0, "dirty bit"},        {0, 1, "corrupt bit"},         {0, 2, "external data file"},
          {0, 3, "compression type"}, {0, 4, "extended L2 entries"}, {1, 0, "lazy refcounts"},
          {2, 0, "bitmaps"},          {2, 1, "raw external data"}};
}

namespace {

// "encryption" is the old name for encrypt.format=aes.
void take_encryption(Options& options, CreateOptions& out) {
  const bool old_name = options.take_bool("encryption", false);
  Options none;
  const auto child = options.take_child("encrypt");
  if (!old_name && !(child && child->options)) return;
  Options& encrypt = child && child->options ? *child->options : none;
  if (old_name && encrypt.has("format")) {
    throw Error(EINVAL,
                "'encrypt.format' and its alias 'encryption' can't be used at the same time");
  }
  if (!old_name && !encrypt.has("format")) {
    throw Error(EINVAL, "Parameter 'encrypt.format' is missing");
  }
  const bool aes = encrypt.take_choice("format", {"luks", "aes"}, old_name ? 1 : 0) == 1;
  if (!encrypt.has("key-secret")) {
    throw Error(EINVAL,
                "Parameter 'encrypt.key-secret' is required for cipher: the id of a "
                "secret object");
  }
  if (aes) {
    out.aes_secret = *encrypt.take_string("key-secret");
  } else {
    out.luks = crypto::take_luks1_create_options(encrypt);
  }
  encrypt.finish("encrypt");
}

}  // namespace

CreateOptions take_create_options(Options& options) {
  CreateOptions out;
  out.size = options.take_size("size").value_or(0);
  out.version = options.take_choice("compat", {"0.10", "v2", "1.1", "v3"}, 2) < 2 ? 2 : 3;
  if (const auto size = options.take_size("cluster_size")) {
    out.cluster_bits = bits_of(*size, kClusterSizeText);
  }
  if (const auto bits = options.take_size("refcount_bits")) {
    out.refcount_order = bits_of(*bits, kRefcountText);
  }
  out.extended_l2 = options.take_bool("extended_l2", false);
  out.compression =
      static_cast<Compression>(options.take_choice("compression_type", {"zlib", "zstd"}, 0));
  out.lazy_refcounts = options.take_bool("lazy_refcounts", false);
  out.preallocation = static_cast<Preallocation>(
      options.take_choice("preallocation", {"off", "metadata", "falloc", "full"}, 0));
  out.data_file = options.take_string("data_file").value_or("");
  out.data_file_raw = options.take_bool("data_file_raw", false);
  out.backing_file = options.take_string("backing_file").value_or("");
  out.backing_format = options.take_string("backing_fmt").value_or("");
  take_encryption(options, out);
  check_create_options(out);
  return out;
}

namespace {

void check_data_file(const CreateOptions& o) {
  if (o.data_file_raw && o.encrypted()) {
    throw Error(EINVAL, "A raw external data file cannot be encrypted");
  }
  if (o.data_file_raw && o.data_file.empty()) {
    throw Error(EINVAL, "data-file-raw requires data-file");
  }
  if (o.data_file.empty()) return;
  if (o.version < 3) {
    throw Error(EINVAL,
                "External data files are only supported with compatibility level 1.1 and above "
                "(use compat=1.1 or greater)");
  }
  if (o.data_file_raw && !o.backing_file.empty()) {
    throw Error(EINVAL, "Backing file and data-file-raw cannot be used at the same time");
  }
  if (o.data_file.size() > kMaxBackingNameBytes) {
    throw Error(EINVAL,
                fmt::format("The data file's name is longer than {} bytes", kMaxBackingNameBytes));
  }
}

}  // namespace

void check_create_options(const CreateOptions& o) {
  if (o.cluster_bits < kMinClusterBits || o.cluster_bits > kMaxClusterBits) {
    throw Error(EINVAL, kClusterSizeText);
  }
  if (o.refcount_order > kMaxRefcountOrder) throw Error(EINVAL, kRefcountText);
  if (o.version < 3 && o.refcount_order != 4) {
    throw Error(EINVAL,
                "Different refcount widths than 16 bits require compatibility level 1.1 "
                "or above (use compat=1.1 or greater)");
  }
  if (o.version < 3 && o.lazy_refcounts) {
    throw Error(EINVAL,
                "Lazy refcounts only supported with compatibility level 1.1 and above "
                "(use compat=1.1 or greater)");
  }
  if (o.version < 3 && o.compression != Compression::kZlib) {
    throw Error(EINVAL,
                "Non-zlib compression type is only supported with compatibility level 1.1 "
                "and above (use compat=1.1 or greater)");
  }
  if (o.extended_l2 && o.version < 3) {
    throw Error(EINVAL,
                "Extended L2 entries are only supported with compatibility level 1.1 and above "
                "(use compat=1.1 or greater)");
  }
  if (o.extended_l2 && o.cluster_bits < kMinExtendedClusterBits) {
    throw Error(EINVAL,
                "Extended L2 entries are only supported with cluster sizes of at least 16384 "
                "bytes");
  }
  check_data_file(o);
  if (o.preallocation != Preallocation::kOff && !o.backing_file.empty() && !o.extended_l2) {
    throw Error(EINVAL,
                "Backing file and preallocation can only be used at the same time if "
                "extended_l2 is on");
  }
  if (o.backing_file.size() > kMaxBackingNameBytes) {
    throw Error(EINVAL, fmt::format("The backing file's name is longer than {} bytes",
                                    kMaxBackingNameBytes));
  }
  if (o.backing_file.empty() && !o.backing_format.empty()) {
    throw Error(EINVAL, "Backing format cannot be used without backing file");
  }
  const Geometry g = o.geometry();
  if (o.size > kMaxDiskSize || g.clusters(o.size) / g.l2_entries() >= kMaxL1Bytes / 8) {
    throw Error(EFBIG,
                "The image size is too large for file format 'qcow2' (try using a larger "
                "cluster size)");
  }
}

void create_image(Edge& file, const CreateOptions& options, Edge* data) {
  CreateOptions o = options;
  check_create_options(o);
  o.size = base::align_up<uint64_t>(o.size, 512);
  const Layout layout = lay_out(o);
  if (layout.table_clusters << o.cluster_bits > kMaxRefcountTableBytes) {
    throw Error(EFBIG,
                "The image needs a refcount table above 8 MiB (try using a larger cluster "
                "size, or smaller refcount_bits)");
  }
  const std::vector<std::byte> header = serialise_header(make_header(o, layout));
  // Before anything is lost: there is a password.
  if (o.encrypted()) (void)crypto::secrets().get_text(o.luks ? o.luks->key_secret : o.aes_secret);
  empty_file(file);
  if (data != nullptr) prepare_data_file(*data, o.size, o.preallocation);
  write_refcounts(file, layout);
  write_tables(file, layout);
  if (o.luks) write_luks_header(file, layout, *o.luks);
  reserve_data(file, layout, o.preallocation);
  file.flush();
  base::Buffer first = base::Buffer::zeroed(o.cluster_size());
  std::copy(header.begin(), header.end(), first.data());
  write_at(file, 0, first);
  file.flush();
}

}  // namespace minivmm::block::qcow2
