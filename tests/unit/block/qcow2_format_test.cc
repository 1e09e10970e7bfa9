// SPDX-License-Identifier: Apache-2.0
// The pure parts of the qcow2 driver: header, table entries, refcounts, lists of free clusters.
#include <random>
#include <set>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "block/formats/qcow2/cluster_counts.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/decompress.h"
#include "block/formats/qcow2/free_runs.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/l2_entry.h"
#include "block/formats/qcow2/overlap.h"
#include "block/formats/qcow2/refcount_codec.h"

namespace minivmm::block::qcow2 {
namespace {

constexpr uint64_t kFileSize = 1 << 20;

Header sample() {
  Header h;
  h.size = 64 << 20;
  h.cluster_bits = 16;
  h.l1_size = 1;
  h.l1_offset = 0x30000;
  h.refcount_table_offset = 0x10000;
  h.refcount_table_clusters = 1;
  return h;
}

std::vector<std::byte> cluster_of(const Header& h) {
  std::vector<std::byte> out = serialise_header(h);
  out.resize(size_t{1} << h.cluster_bits);
  return out;
}

std::string refusal(const std::vector<std::byte>& bytes, uint64_t file_size = kFileSize) {
  try {
    require_supported(parse_header(bytes, file_size));
  } catch (const base::Error& e) {
    return e.what();
  }
  return "accepted";
}

template <typename T>
std::string refusal_with(uint64_t offset, T value) {
  auto bytes = cluster_of(sample());
  base::store_be(bytes.data() + offset, value);
  return refusal(bytes);
}

TEST(Qcow2Header, SurvivesARoundTrip) {
  Header h = sample();
  h.has_backing = true;
  h.backing_file = "base.raw";
  h.backing_format = "raw";
  h.compatible = kCompatLazyRefcounts;
  h.header_length = 120;
  h.more_fields.assign(15, std::byte{0});
  h.more_fields[8] = std::byte{0x5a};  // a field of a later version: kept
  h.unknown_extensions.push_back({0x12345678, {std::byte{1}, std::byte{2}, std::byte{3}}});
  h.feature_names = {{0, 7, "seventh"}};
  const Header back = parse_header(cluster_of(h), kFileSize);
  EXPECT_EQ(back.backing_file, "base.raw");
  EXPECT_EQ(back.backing_format, "raw");
  EXPECT_EQ(back.size, h.size);
  EXPECT_EQ(back.more_fields, h.more_fields);
  ASSERT_EQ(back.unknown_extensions.size(), 1U);
  EXPECT_EQ(back.unknown_extensions[0].type, 0x12345678U);
  EXPECT_EQ(back.unknown_extensions[0].data, h.unknown_extensions[0].data);
  ASSERT_EQ(back.feature_names.size(), 1U);
  EXPECT_EQ(back.feature_names[0].name, "seventh");
  EXPECT_EQ(serialise_header(back), serialise_header(h));
}

// Data is encrypted by sectors of 512 bytes: there is no part of one.
TEST(Qcow2Header, AnEncryptedDiskIsWholeSectors) {
  Header h = sample();
  h.crypt_method = kCryptAes;
  EXPECT_EQ(refusal(cluster_of(h)), "accepted");
  h.size += 1;
  EXPECT_NE(refusal(cluster_of(h)).find("is odd"), std::string::npos);
  h.crypt_method = kCryptNone;
  EXPECT_EQ(refusal(cluster_of(h)), "accepted");
}

TEST(Qcow2Header, RefusesEachBadFieldByName) {
  EXPECT_EQ(refusal(cluster_of(sample())), "accepted");
  const auto has = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  has(refusal_with<uint32_t>(0, 0x12345678), "magic");
  has(refusal_with<uint32_t>(4, 1), "version 1");
  has(refusal_with<uint32_t>(20, 8), "cluster_bits 8");
  has(refusal_with<uint32_t>(20, 22), "cluster_bits 22");
  has(refusal_with<uint32_t>(20, ~0U), "cluster_bits");
  has(refusal_with<uint64_t>(24, ~uint64_t{0}), "disk size");
  has(refusal_with<uint64_t>(24, uint64_t{1} << 40), "l1_size 1 is too small");
  has(refusal_with<uint32_t>(32, 2), "LUKS");
  has(refusal_with<uint32_t>(32, 9), "crypt_method 9");
  has(refusal_with<uint32_t>(36, ~0U), "l1_size");
  has(refusal_with<uint64_t>(40, 0x30001), "L1 table offset");
  has(refusal_with<uint64_t>(40, 0), "L1 table lies in the header");
  has(refusal_with<uint64_t>(40, kFileSize), "past the end");
  has(refusal_with<uint64_t>(40, ~uint64_t{0xffff}), "past the end");
  has(refusal_with<uint64_t>(40, 0x10000), "overlaps the refcount table");
  has(refusal_with<uint64_t>(48, 0x10200), "refcount table offset");
  has(refusal_with<uint64_t>(48, 0), "refcount table lies in the header");
  has(refusal_with<uint32_t>(56, 0), "no refcount table");
  has(refusal_with<uint32_t>(56, 0x10000), "refcount_table_clusters");
  has(refusal_with<uint32_t>(60, 70000), "nb_snapshots");
  has(refusal_with<uint32_t>(60, 1), "snapshot table");
  Header small = sample();
  small.cluster_bits = 13;
  small.incompatible = kIncompatExtendedL2;
  has(refusal(cluster_of(small)), "which extended L2 entries need");
  has(refusal_with<uint64_t>(72, 32), "feature number 5");
  has(refusal_with<uint64_t>(72, 8), "compression_type");
  has(refusal_with<uint64_t>(88, 1), "bitmaps");
  has(refusal_with<uint32_t>(96, 7), "refcount_order 7");
  has(refusal_with<uint32_t>(100, 96), "header_length 96");
  has(refusal_with<uint32_t>(100, 105), "header_length");
  has(refusal_with<uint32_t>(100, 0x7ffffff8), "header_length");
  has(refusal_with<uint8_t>(104, 1), "compression_type");
}

TEST(Qcow2Header, RefusesAnExtensionPastTheEnd) {
  auto bytes = cluster_of(sample());
  base::store_be(bytes.data() + 112, uint32_t{0x12345678});
  for (const uint32_t length : {65536U, 0x7fffffffU, 0xfffffff0U, 0xffffffffU}) {
    base::store_be(bytes.data() + 116, length);
    EXPECT_NE(refusal(bytes).find("extension 0x12345678"), std::string::npos) << length;
  }
}

// Another program that wrote to the image may have freed them and cut the file: the bitmaps are out
// of date, the disk is not.
TEST(Qcow2Header, OutOfDateBitmapsAreKeptAndNotLookedAt) {
  Header h = sample();
  h.bitmaps = BitmapsExtension{3, 100, 0x7000'0000};
  EXPECT_EQ(refusal(cluster_of(h)), "accepted");
  const Header parsed = parse_header(cluster_of(h), kFileSize);
  EXPECT_FALSE(parsed.bitmaps);
  ASSERT_EQ(parsed.unknown_extensions.size(), 1U);
  EXPECT_EQ(parsed.unknown_extensions[0].type, kExtBitmaps);
  EXPECT_EQ(parsed.unknown_extensions[0].data.size(), 24U);
  h.autoclear = kAutoclearBitmaps;
  EXPECT_NE(refusal(cluster_of(h)).find("bitmap directory"), std::string::npos);
}

TEST(Qcow2Header, RefusesABadBackingName) {
  Header h = sample();
  h.has_backing = true;
  h.backing_file = "base.raw";
  const auto good = cluster_of(h);
  auto bad = good;
  base::store_be(bad.data() + 8, uint64_t{0xffff});
  EXPECT_NE(refusal(bad).find("not inside the first cluster"), std::string::npos);
  bad = good;
  base::store_be(bad.data() + 16, uint32_t{2000});
  EXPECT_NE(refusal(bad).find("above 1023"), std::string::npos);
  bad = good;
  base::store_be(bad.data() + 8, uint64_t{8});
  EXPECT_NE(refusal(bad).find("not inside the first cluster"), std::string::npos);
  bad = good;
  bad[base::load_be<uint64_t>(bad.data() + 8) + 2] = std::byte{0};
  EXPECT_NE(refusal(bad).find("zero byte"), std::string::npos);
}

TEST(Qcow2Header, NamesAnUnknownFeatureByTheImagesOwnTable) {
  Header h = sample();
  h.incompatible = uint64_t{1} << 40;
  h.feature_names = {{0, 40, "time travel"}};
  EXPECT_NE(refusal(cluster_of(h)).find("'time travel'"), std::string::npos);
}

TEST(Qcow2Header, EveryTruncationIsAnError) {
  const auto whole = cluster_of(sample());
  for (size_t n = 0; n < 112; ++n) {
    const std::vector<std::byte> cut(whole.begin(), whole.begin() + static_cast<long>(n));
    EXPECT_NE(refusal(cut, n), "accepted") << n;
  }
}

ClusterKind kind_of(uint64_t entry, const Geometry& g) {
  return decode_l2({entry, 0}, g, 0).kind(0);
}

TEST(Qcow2Layout, DecodesEveryKindOfEntry) {
  const Geometry g{16, 4, 3};
  EXPECT_EQ(kind_of(0, g), ClusterKind::kUnallocated);
  EXPECT_EQ(kind_of(kFlagZero, g), ClusterKind::kZeroPlain);
  EXPECT_EQ(kind_of(0x50000 | kFlagZero, g), ClusterKind::kZeroAllocated);
  const L2Entry data = decode_l2({0x50000 | kFlagCopied, 0}, g, 0);
  EXPECT_EQ(data.kind(0), ClusterKind::kData);
  EXPECT_TRUE(data.copied);
  EXPECT_EQ(data.host_offset, 0x50000U);
  EXPECT_EQ(kind_of(0x50200, g), ClusterKind::kInvalid);      // misaligned
  EXPECT_EQ(kind_of(0x50000 | 2, g), ClusterKind::kInvalid);  // reserved, low
  EXPECT_EQ(kind_of(0x50000 | 1ULL << 57, g), ClusterKind::kInvalid);
  EXPECT_EQ(kind_of(kFlagCopied, g), ClusterKind::kInvalid);  // the header
  EXPECT_EQ(kind_of(kFlagZero, Geometry{16, 4, 2}), ClusterKind::kInvalid);
}

TEST(Qcow2Layout, EncodesWhatItDecodes) {
  const Geometry g{16, 4, 3};
  for (const uint64_t entry : {uint64_t{0}, kFlagZero, 0x50000 | kFlagZero | kFlagCopied,
                               uint64_t{0x50000}, 0x50000 | kFlagCopied}) {
    EXPECT_EQ(encode_l2(decode_l2({entry, 0}, g, 0), g), (RawL2{entry, 0}));
  }
  const Geometry extended{16, 4, 3, true};
  const RawL2 mixed{0x50000 | kFlagCopied, uint64_t{0xff00} << 32 | 0x00f1};
  EXPECT_EQ(encode_l2(decode_l2(mixed, extended, 0), extended), mixed);
  const RawL2 zero{0, ~uint64_t{0} << 32};
  EXPECT_EQ(encode_l2(decode_l2(zero, extended, 0), extended), zero);
}

TEST(Qcow2Layout, DecodesSubclusters) {
  const Geometry g{16, 4, 3, true};
  const L2Entry entry = decode_l2({0x50000, uint64_t{0xff00} << 32 | 0x00f1}, g, 0);
  EXPECT_EQ(entry.kind(0), ClusterKind::kData);
  EXPECT_EQ(entry.kind(1), ClusterKind::kUnallocated);
  EXPECT_EQ(entry.kind(7), ClusterKind::kData);
  EXPECT_EQ(entry.kind(8), ClusterKind::kZeroAllocated);
  EXPECT_EQ(entry.kind(31), ClusterKind::kUnallocated);
  EXPECT_EQ(entry.same_kind(0, 32), 1U);
  EXPECT_EQ(entry.same_kind(1, 32), 3U);
  EXPECT_EQ(entry.same_kind(4, 32), 4U);
  EXPECT_EQ(entry.same_kind(5, 6), 1U);
  EXPECT_EQ(entry.same_kind(9, 32), 7U);
  EXPECT_EQ(entry.same_kind(16, 32), 16U);
  EXPECT_EQ(decode_l2({0, uint64_t{1} << 33}, g, 0).kind(1), ClusterKind::kZeroPlain);
  // Contradictions, and the flag that extended entries do not have.
  EXPECT_NE(decode_l2({0x50000, uint64_t{1} << 32 | 1}, g, 0).problem, nullptr);
  EXPECT_NE(decode_l2({0, 1}, g, 0).problem, nullptr);
  EXPECT_NE(decode_l2({0x50000 | kFlagZero, 0}, g, 0).problem, nullptr);
  EXPECT_EQ(g.l2_entries(), 4096U);
  EXPECT_EQ(g.subcluster_size(), 2048U);
  EXPECT_EQ(subcluster_mask(0, 32), ~uint32_t{0});
  EXPECT_EQ(subcluster_mask(3, 5), 0x18U);
  EXPECT_EQ(subcluster_mask(31, 32), 0x8000'0000U);
}

TEST(Qcow2Layout, DataInAnotherFileLiesWhereTheGuestHasIt) {
  const Geometry g{16, 4, 3, false, true};
  EXPECT_EQ(decode_l2({kFlagCopied, 0}, g, 0).kind(0), ClusterKind::kData);
  EXPECT_EQ(decode_l2({0, 0}, g, 0).kind(0), ClusterKind::kUnallocated);
  EXPECT_EQ(decode_l2({0x50000 | kFlagCopied, 0}, g, 0x50000).kind(0), ClusterKind::kData);
  EXPECT_NE(decode_l2({0x50000 | kFlagCopied, 0}, g, 0x40000).problem, nullptr);
  EXPECT_NE(decode_l2({kFlagCompressed | 0x50000, 0}, g, 0x50000).problem, nullptr);
  EXPECT_EQ(clusters_of(decode_l2({0x50000 | kFlagCopied, 0}, g, 0x50000), g).count, 0U);
  for (const uint64_t entry : {kFlagCopied, kFlagCopied | kFlagZero, kFlagZero, uint64_t{0}}) {
    EXPECT_EQ(encode_l2(decode_l2({entry, 0}, g, 0), g), (RawL2{entry, 0}));
  }
}

TEST(Qcow2Layout, DecodesCompressedEntriesForEveryClusterSize) {
  for (unsigned bits = kMinClusterBits; bits <= kMaxClusterBits; ++bits) {
    const Geometry g{bits, 4, 3};
    const unsigned x = 62 - (bits - 8);
    const uint64_t offset = (5ULL << bits) + 700;
    const L2Entry entry = decode_l2({kFlagCompressed | (uint64_t{1} << x) | offset, 0}, g, 0);
    EXPECT_EQ(entry.kind(0), ClusterKind::kCompressed);
    EXPECT_EQ(entry.host_offset, offset);
    EXPECT_EQ(entry.compressed_bytes, 1024 - offset % 512);
    const HostClusters host = clusters_of(entry, g);
    EXPECT_EQ(host.first, offset >> bits);
    EXPECT_EQ(host.count, ((offset + entry.compressed_bytes - 1) >> bits) - host.first + 1);
    // The most that any entry can ask to be read.
    const uint64_t largest = kFlagCompressed | ((1ULL << 62) - 1 - ((1ULL << x) - 1)) | 512;
    EXPECT_LE(decode_l2({largest, 0}, g, 0).compressed_bytes, 2 * g.cluster_size());
  }
}

TEST(Qcow2Refcounts, EveryWidthKeepsItsNeighbours) {
  std::mt19937_64 random(7);
  for (unsigned order = 0; order <= kMaxRefcountOrder; ++order) {
    std::vector<std::byte> block(512);
    const uint64_t entries = (512 * 8) >> order;
    const uint64_t max = Geometry{9, order, 3}.refcount_max();
    std::vector<uint64_t> model(entries);
    for (int i = 0; i < 2000; ++i) {
      const uint64_t index = random() % entries;
      model[index] = max == ~uint64_t{0} ? random() : random() % (max + 1);
      set_refcount(block.data(), index, order, model[index]);
    }
    for (uint64_t i = 0; i < entries; ++i) {
      ASSERT_EQ(get_refcount(block.data(), i, order), model[i]) << "order " << order << " at " << i;
    }
  }
  // Entry 0 is in the least significant bits.
  std::byte one[1] = {std::byte{1}};
  EXPECT_EQ(get_refcount(one, 0, 0), 1U);
  EXPECT_EQ(get_refcount(one, 1, 0), 0U);
}

TEST(Qcow2FreeRuns, AgreesWithASetUnderRandomUse) {
  std::mt19937_64 random(11);
  FreeRuns runs;
  std::set<uint64_t> model;
  for (int i = 0; i < 20000; ++i) {
    if (random() % 3 != 0) {
      const uint64_t first = random() % 500;
      const uint64_t count = random() % 9;
      runs.add(first, count);
      for (uint64_t k = 0; k < count; ++k) model.insert(first + k);
    } else {
      const uint64_t max = 1 + random() % 12;
      const uint64_t border = random() % 500;
      const auto run = runs.take(max, border);
      ASSERT_EQ(run.has_value(), !model.empty());
      if (!run) continue;
      ASSERT_EQ(run->first, *model.begin());
      ASSERT_GE(run->count, 1U);
      ASSERT_LE(run->count, max);
      ASSERT_TRUE(run->first >= border || run->first + run->count <= border);
      for (uint64_t k = 0; k < run->count; ++k) ASSERT_EQ(model.erase(run->first + k), 1U);
    }
    ASSERT_EQ(runs.clusters(), model.size());
  }
}

TEST(Qcow2FreeRuns, ForgetsTheHighestRuns) {
  FreeRuns runs;
  for (uint64_t i = 0; i < 10; ++i) runs.add(i * 10, 3);
  EXPECT_EQ(runs.forget_above(10), std::nullopt);
  EXPECT_EQ(runs.forget_above(4), 40U);
  EXPECT_EQ(runs.runs(), 4U);
  EXPECT_EQ(runs.clusters(), 12U);
  EXPECT_EQ(runs.take(100, 0)->first, 0U);
}

TEST(Qcow2Overlap, FindsFixedAndAddedMetadata) {
  MetadataMap map(sample());
  EXPECT_STREQ(map.find(0, 1), "header");
  EXPECT_STREQ(map.find(3, 1), "L1 table");
  EXPECT_STREQ(map.find(1, 1), "refcount table");
  EXPECT_EQ(map.find(4, 1000), nullptr);
  map.add(100, kL2Table);
  EXPECT_EQ(map.find(90, 20), kL2Table);
  EXPECT_EQ(map.find(101, 20), nullptr);
  EXPECT_EQ(map.find(100, 1, kL2Table), nullptr);
  EXPECT_EQ(map.find(100, 1, kRefcountBlock), kL2Table);
  EXPECT_STREQ(map.find(2, 10, kL2Table), "L1 table");
  EXPECT_EQ(map.find(2, 10, kL1Table), nullptr);
  map.move_snapshot_table(300, 2);
  EXPECT_EQ(map.find(290, 11), kSnapshotTable);
  map.move_snapshot_table(300, 0);
  EXPECT_EQ(map.find(290, 11), nullptr);
  map.move_refcount_table(200, 2);
  EXPECT_EQ(map.find(1, 1), nullptr);
  EXPECT_STREQ(map.find(201, 1), "refcount table");
  EXPECT_TRUE(map.remove(100));
  EXPECT_FALSE(map.remove(100));
  EXPECT_EQ(map.find(100, 1), nullptr);
}

// The filter grows with the L1 table; what was added is found whatever its size.
TEST(Qcow2Overlap, FindsEachOfManyTables) {
  for (const uint32_t tables : {1U, 5'000U, 300'000U}) {
    Header h = sample();
    h.l1_size = tables;
    MetadataMap map(h);
    for (uint64_t i = 0; i < tables; ++i) map.add(1000 + i * 3, kL2Table);
    for (uint64_t i = 0; i < tables; ++i) {
      ASSERT_EQ(map.find(1000 + i * 3, 1), kL2Table) << i;
      ASSERT_EQ(map.find(1001 + i * 3, 2), nullptr) << i;
    }
  }
}

TEST(Qcow2ClusterCounts, CountsPastAByte) {
  ClusterCounts counts;
  for (uint64_t i = 0; i < 1000; ++i) EXPECT_EQ(counts.add(12345), i);
  EXPECT_EQ(counts.get(12345), 1000U);
  EXPECT_EQ(counts.get(12346), 0U);
  for (uint64_t times : {1U, 253U, 254U, 255U, 256U, 70'000U}) {
    ClusterCounts many;
    EXPECT_EQ(many.add(7, times), 0U);
    EXPECT_EQ(many.add(7, times), times);
    EXPECT_EQ(many.add(7, 1), 2 * times);
    EXPECT_EQ(many.get(7), 2 * times + 1);
  }
  EXPECT_EQ(counts.chunks(), std::vector<uint64_t>{12345 / 256 * 256});
}

TEST(Qcow2Decompress, RefusesGarbageOfEitherKind) {
  std::mt19937_64 random(3);
  std::vector<std::byte> out(65536);
  for (const auto kind : {Compression::kZlib, Compression::kZstd}) {
    for (int i = 0; i < 500; ++i) {
      std::vector<std::byte> in(1 + random() % 3000);
      for (auto& b : in) b = static_cast<std::byte>(random());
      // A few random bytes cannot be 64 KiB of data; deflate could, by a miracle.
      const bool refused = decompress(kind, in, out) != nullptr;
      EXPECT_TRUE(refused || kind == Compression::kZlib);
    }
    EXPECT_NE(decompress(kind, {}, out), nullptr);
  }
}

TEST(Qcow2Create, RefusesWhatTheFormatCannotSay) {
  const auto refused = [](const CreateOptions& options) {
    try {
      check_create_options(options);
    } catch (const base::Error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused({.size = 1 << 20}), "accepted");
  EXPECT_NE(refused({.version = 2, .refcount_order = 3}).find("Different refcount widths"),
            std::string::npos);
  EXPECT_NE(refused({.size = uint64_t{1} << 40, .cluster_bits = 9}).find("too large"),
            std::string::npos);
  EXPECT_NE(refused({.cluster_bits = 13, .extended_l2 = true}).find("at least 16384 bytes"),
            std::string::npos);
  EXPECT_NE(refused({.version = 2, .extended_l2 = true}).find("Extended L2 entries are only"),
            std::string::npos);
  EXPECT_EQ(refused({.data_file_raw = true}), "data-file-raw requires data-file");
  EXPECT_NE(refused({.version = 2, .data_file = "d"}).find("External data files are only"),
            std::string::npos);
  EXPECT_NE(refused({.data_file = "d", .data_file_raw = true, .backing_file = "b"})
                .find("cannot be used at the same time"),
            std::string::npos);
  EXPECT_NE(refused({.cluster_bits = 22}).find("Cluster size must be"), std::string::npos);
  EXPECT_NE(refused({.size = ~uint64_t{0}, .cluster_bits = 21}).find("too large"),
            std::string::npos);
}

}  // namespace
}  // namespace minivmm::block::qcow2
