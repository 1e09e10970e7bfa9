// SPDX-License-Identifier: Apache-2.0
// Images whose tables lie. Each is an error or harmless, in bounded time; nothing of the image's
// metadata is overwritten, and a check says what is wrong.
#include <chrono>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/log.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/listing.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint64_t kCluster = 4096;
constexpr uint64_t kDisk = 4 << 20;

class Qcow2Hostile : public GraphTest {
 protected:
  // Each damaged image is worth a line in a log, and there are hundreds here.
  Qcow2Hostile() { base::set_log_level(base::LogLevel::kOff); }
  ~Qcow2Hostile() override { base::set_log_level(base::LogLevel::kWarning); }

  // A good image with one allocated cluster at guest offset 0, as bytes. Fiber.
  Bytes good_image(unsigned version = 3) {
    auto file = make_test_image({.size = kDisk, .version = version, .cluster_bits = 12});
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes data(kCluster, std::byte{5});
      disk.write(0, base::SingleBuffer(std::span(data)));
    }
    node->close();
    return file->content();
  }
  static uint64_t get(const Bytes& image, uint64_t offset) {
    return base::load_be<uint64_t>(image.data() + offset);
  }
  static void put(Bytes& image, uint64_t offset, uint64_t value) {
    base::store_be(image.data() + offset, value);
  }
  static uint64_t l1_offset(const Bytes& image) { return get(image, 40); }
  static uint64_t l2_offset(const Bytes& image) {
    return get(image, l1_offset(image)) & qcow2::kOffsetMask;
  }

  uint64_t corruptions(const Bytes& image) {
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    Edge edge(file, "check", {});
    return qcow2::check_image(edge, [](const std::string&) {}).corruptions;
  }

  struct Outcome {
    int read = 0;   // errno of reading guest offset 0
    int write = 0;  // errno of writing there
    int later = 0;  // errno of a write elsewhere afterwards
    uint64_t incompatible = 0;
    Bytes image;
  };
  Outcome use(const Bytes& image) {
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    Outcome out;
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      Bytes data(kCluster, std::byte{9});
      out.read = error_number([&] {
        Bytes to(kCluster);
        disk.read(0, base::SingleBuffer(to.data(), to.size()));
      });
      out.write = error_number(
          [&] { disk.write(0, base::SingleBuffer(std::span<const std::byte>(data))); });
      out.later = error_number(
          [&] { disk.write(kDisk / 2, base::SingleBuffer(std::span<const std::byte>(data))); });
    }
    node->close();
    out.image = file->content();
    out.incompatible = get(out.image, 72);
    return out;
  }
  // Reads and writes are refused, the image is marked, nothing else in it has changed.
  void expect_refused(const Bytes& image) {
    const Outcome out = use(image);
    EXPECT_EQ(out.read, EIO);
    EXPECT_EQ(out.write, EIO);
    EXPECT_EQ(out.later, EIO) << "writes go on after corruption was found";
    EXPECT_EQ(out.incompatible, qcow2::kIncompatCorrupt);
    Bytes expected = image;
    put(expected, 72, qcow2::kIncompatCorrupt);
    EXPECT_EQ(out.image, expected);
    EXPECT_GT(corruptions(image), 0U);
  }
};

TEST_F(Qcow2Hostile, BadL1EntriesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t flag = qcow2::kFlagCopied;
    for (const uint64_t entry :
         {uint64_t{0x200}, uint64_t{1}, flag, flag | 0x1200, flag | 1, flag | uint64_t{1} << 58,
          flag | uint64_t{1} << 50, flag | 0x00ff'ffff'ffff'f000}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, l1_offset(image), entry);
      expect_refused(image);
    }
  });
}

// A shared table that is not there: a copy of it would be empty, and the disk with it.
TEST_F(Qcow2Hostile, ATablePastTheEndIsNotCopied) {
  on_fiber([&] {
    Bytes image = good_image();
    put(image, l1_offset(image), uint64_t{1} << 40);
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    const Bytes data(kCluster, std::byte{9});
    EXPECT_EQ(error_number([&] {
                Edge(node, "guest", Permissions::front_end(true))
                    .write(kCluster, base::SingleBuffer(std::span(data)));
              }),
              EIO);
    node->close();
    EXPECT_EQ(get(file->content(), 72), qcow2::kIncompatCorrupt);
    EXPECT_EQ(get(file->content(), l1_offset(image)), uint64_t{1} << 40);
  });
}

TEST_F(Qcow2Hostile, BadL2EntriesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t flag = qcow2::kFlagCopied;
    for (const uint64_t entry :
         {flag, flag | 0x200, flag | 0x7002, flag | uint64_t{1} << 57, flag | uint64_t{1} << 50,
          flag | base::align_up<uint64_t>(good.size(), kCluster),
          flag | qcow2::kFlagCompressed | 0x5000, qcow2::kFlagCompressed,
          qcow2::kFlagCompressed | uint64_t{1} << 40}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, l2_offset(image), entry);
      expect_refused(image);
    }
  });
}

// The entry claims that guest data lies in metadata. Reading that is harmless; writing is not.
TEST_F(Qcow2Hostile, DataIsNeverWrittenOverMetadata) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t refcount_table = get(good, 48);
    const uint64_t block = get(good, refcount_table);
    for (const uint64_t target : {l1_offset(good), l2_offset(good), refcount_table, block}) {
      for (const uint64_t flags :
           {qcow2::kFlagCopied, qcow2::kFlagCopied | qcow2::kFlagZero, uint64_t{0}}) {
        SCOPED_TRACE(fmt::format("target {:#x} flags {:#x}", target, flags));
        Bytes image = good;
        put(image, l2_offset(image), target | flags);
        const Outcome out = use(image);
        // Without the flag the write goes elsewhere, and the lie shows when the old is dropped.
        EXPECT_EQ(out.write, flags == 0 ? 0 : EIO);
        EXPECT_EQ(out.later, EIO);
        for (const uint64_t kept : {l1_offset(good), refcount_table}) {
          EXPECT_TRUE(std::equal(image.begin() + static_cast<long>(kept),
                                 image.begin() + static_cast<long>(kept + kCluster),
                                 out.image.begin() + static_cast<long>(kept)));
        }
        EXPECT_GT(corruptions(image), 0U);
      }
    }
  });
}

TEST_F(Qcow2Hostile, ZeroesAreNeverWrittenOverMetadata) {
  on_fiber([&] {
    const Bytes good = good_image();
    for (const uint64_t target : {l1_offset(good), l2_offset(good), get(good, 48)}) {
      SCOPED_TRACE(target);
      Bytes image = good;
      put(image, l2_offset(image), target | qcow2::kFlagCopied);
      auto file = std::make_shared<TestFile>();
      file->set_content(image);
      auto node = open_test_image(file);
      EXPECT_EQ(error_number([&] {
                  Edge(node, "guest", Permissions::front_end(true)).write_zeroes(512, 512);
                }),
                EIO);
      node->close();
      put(image, 72, qcow2::kIncompatCorrupt);
      EXPECT_TRUE(file->content() == image);
    }
  });
}

// Both give it up: it must not be free twice, or while the other still has it.
TEST_F(Qcow2Hostile, AClusterThatTwoEntriesHaveIsNotFreedTwice) {
  on_fiber([&] {
    Bytes image = good_image();
    put(image, l2_offset(image) + 8, get(image, l2_offset(image)));
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      disk.discard(0, 2 * kCluster);
      (void)error_number([&] { disk.flush(); });
    }
    (void)error_number([&] { node->close(); });
    EXPECT_EQ(get(file->content(), 72), qcow2::kIncompatCorrupt);
  });
}

// Two tables in one place: nothing that a request looks at says so, only the commit can notice.
// Reads go on, with what was written.
TEST_F(Qcow2Hostile, TablesAreNotWrittenOverEachOther) {
  on_fiber([&] {
    Bytes image = good_image();
    image[60 + 3] = std::byte{1};  // one internal snapshot
    put(image, 64, l1_offset(image));
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes data(kCluster, std::byte{9});
      // Behind what the first L2 table describes: the L1 table changes.
      const auto write = [&] { disk.write(kDisk - kCluster, base::SingleBuffer(std::span(data))); };
      write();
      EXPECT_EQ(error_number([&] { disk.flush(); }), EIO);
      EXPECT_EQ(error_number(write), EIO);
      for (const auto& [at, value] : {std::pair{uint64_t{0}, 5}, std::pair{kDisk - kCluster, 9}}) {
        Bytes got(kCluster);
        disk.read(at, base::SingleBuffer(got.data(), got.size()));
        EXPECT_EQ(got, Bytes(kCluster, static_cast<std::byte>(value)));
      }
      const Bytes now = file->content();
      EXPECT_EQ(get(now, 72), qcow2::kIncompatCorrupt);
      const auto l1 = static_cast<long>(l1_offset(image));
      EXPECT_TRUE(std::equal(image.begin() + l1, image.begin() + l1 + kCluster, now.begin() + l1));
    }
    EXPECT_EQ(error_number([&] { node->close(); }), EIO);
  });
}

// The same for the refcount table, which changes when the file has outgrown the first block.
TEST_F(Qcow2Hostile, TheRefcountTableIsNotWrittenOverAnother) {
  on_fiber([&] {
    auto file = make_test_image({.size = kDisk, .cluster_bits = 12, .refcount_order = 6});
    Bytes image = file->content();
    const uint64_t table = get(image, 48);
    image[60 + 3] = std::byte{1};  // one internal snapshot
    put(image, 64, table);
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes data(kDisk * 3 / 4, std::byte{9});
      disk.write(0, base::SingleBuffer(std::span(data)));
      EXPECT_EQ(error_number([&] { disk.flush(); }), EIO);
    }
    const Bytes now = file->content();
    EXPECT_EQ(get(now, 72), qcow2::kIncompatCorrupt);
    const auto at = static_cast<long>(table);
    EXPECT_TRUE(std::equal(image.begin() + at, image.begin() + at + kCluster, now.begin() + at));
    EXPECT_EQ(error_number([&] { node->close(); }), EIO);
  });
}

// A larger refcount table is put where nothing is counted yet. Something may lie there all the
// same.
TEST_F(Qcow2Hostile, AGrowingRefcountTableIsNotWrittenOverAnother) {
  on_fiber([&] {
    // The table of one cluster counts 2 MiB.
    constexpr uint64_t kCounted = 2 << 20;
    auto file = make_test_image({.size = kDisk, .cluster_bits = 9, .refcount_order = 6});
    Bytes image = file->content();
    image.resize(kCounted + 65536);
    put(image, l1_offset(image) + kDisk / 32768 * 8 - 8, kCounted | qcow2::kFlagCopied);
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes data(kDisk * 3 / 4, std::byte{9});
      EXPECT_EQ(error_number([&] { disk.write(0, base::SingleBuffer(std::span(data))); }), EIO);
    }
    (void)error_number([&] { node->close(); });
    const Bytes now = file->content();
    EXPECT_EQ(get(now, 72), qcow2::kIncompatCorrupt);
    EXPECT_TRUE(std::equal(image.begin() + kCounted, image.begin() + kCounted + 4096,
                           now.begin() + kCounted));
  });
}

// Tables of what lies beside the disk: a snapshot's, the bitmaps'. The check counts two references
// and is content; writing is where harm would be done.
TEST_F(Qcow2Hostile, TablesOfSnapshotsAndBitmapsAreNotWrittenOver) {
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    file->set_content(good_image());
    {
      auto node = open_test_image(file);
      (void)node->snapshots()->create("one");
      node->dirty_bitmaps()->add("b", 4096, true);
      const Bytes data(kCluster, std::byte{6});
      Edge(node, "guest", Permissions::front_end(true))
          .write(0, base::SingleBuffer(std::span(data)));
      node->close();
    }
    const Bytes good = file->content();
    qcow2::Header header;
    std::vector<qcow2::SnapshotEntry> snapshots;
    std::vector<qcow2::BitmapEntry> bitmaps;
    {
      Edge edge(file, "look", {});
      header = qcow2::read_header(edge);
      snapshots = qcow2::read_snapshots(edge, header);
      bitmaps = qcow2::read_bitmaps(edge, header);
    }
    ASSERT_EQ(snapshots.size(), 1U);
    ASSERT_GE(bitmaps.size(), 1U);
    for (const uint64_t target : {header.snapshots_offset, snapshots[0].l1_offset,
                                  header.bitmaps->directory_offset, bitmaps[0].table_offset}) {
      SCOPED_TRACE(target);
      Bytes image = good;
      put(image, l2_offset(image), target | qcow2::kFlagCopied);
      const Outcome out = use(image);
      EXPECT_EQ(out.read, 0);
      EXPECT_EQ(out.write, EIO);
      EXPECT_EQ(out.later, EIO);
      EXPECT_EQ(out.incompatible, qcow2::kIncompatCorrupt);
      const auto at = static_cast<long>(target);
      if (target == header.bitmaps->directory_offset) continue;  // it says "in use" now
      EXPECT_TRUE(
          std::equal(good.begin() + at, good.begin() + at + kCluster, out.image.begin() + at));
    }
  });
}

// A list of snapshots that all have the same, large L1 table: knowing where they lie takes no time.
TEST_F(Qcow2Hostile, ManySnapshotsInOnePlaceAreKnownInBoundedTime) {
  on_fiber([&] {
    constexpr uint32_t kMany = 60000;
    constexpr uint64_t kTable = 16 << 20;
    Bytes image = good_image();
    const uint64_t l1 = base::align_up<uint64_t>(image.size(), kCluster);
    const uint64_t list = l1 + kTable;
    image.resize(list + uint64_t{kMany} * 40);
    for (uint32_t i = 0; i < kMany; ++i) {
      put(image, list + uint64_t{i} * 40, l1);
      base::store_be(image.data() + list + uint64_t{i} * 40 + 8, static_cast<uint32_t>(kTable / 8));
    }
    base::store_be(image.data() + 60, kMany);
    put(image, 64, list);
    const auto start = std::chrono::steady_clock::now();
    const Outcome out = use(image);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
    EXPECT_EQ(out.read, 0);
  });
}

// The entry claims that other metadata is a table which a snapshot shares. Making a copy of it
// would end with the "old table" being freed: a hole where the L1 table or the refcounts were.
TEST_F(Qcow2Hostile, MetadataIsNotFreedAsAnOldL2Table) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t refcount_table = get(good, 48);
    for (const uint64_t target : {l1_offset(good), refcount_table, get(good, refcount_table)}) {
      SCOPED_TRACE(target);
      Bytes image = good;
      put(image, l1_offset(image), target);
      const Outcome out = use(image);
      EXPECT_EQ(out.write, EIO);
      EXPECT_EQ(out.later, EIO);
      Bytes expected = image;
      put(expected, 72, qcow2::kIncompatCorrupt);
      EXPECT_EQ(out.image, expected);
    }
  });
}

// A snapshot whose tree names tables of the disk: deleting it would free them.
TEST_F(Qcow2Hostile, MetadataIsNotFreedWithASnapshot) {
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    file->set_content(good_image());
    uint64_t theirs = 0;  // the snapshot's L2 table
    {
      auto node = open_test_image(file);
      (void)node->snapshots()->create("one");
      node->close();
      Edge edge(file, "look", {0, Permissions::kWrite | Permissions::kResize});
      const auto header = qcow2::read_header(edge);
      const uint64_t l1 = qcow2::read_snapshots(edge, header).at(0).l1_offset;
      theirs = get(file->content(), l1) & qcow2::kOffsetMask;
    }
    const Bytes good = file->content();
    const uint64_t table = get(good, 48);
    for (const uint64_t target : {l1_offset(good), l2_offset(good), table, get(good, table)}) {
      SCOPED_TRACE(target);
      Bytes image = good;
      put(image, theirs, target);
      file->set_content(image);
      auto node = open_test_image(file);
      EXPECT_EQ(error_number([&] { node->snapshots()->remove("one"); }), EIO);
      (void)error_number([&] { node->close(); });
      Bytes after = file->content();
      ASSERT_GE(after.size(), image.size());
      EXPECT_EQ(get(after, 72), qcow2::kIncompatCorrupt);
      put(after, 72, get(image, 72));
      EXPECT_TRUE(std::equal(image.begin(), image.begin() + kCluster, after.begin()));
      // Refcounts of room that was taken may have gone up, but for the header's.
      const bool counts = target == get(good, table);
      const auto at = static_cast<long>(target);
      EXPECT_TRUE(std::equal(image.begin() + at, image.begin() + at + (counts ? 2 : kCluster),
                             after.begin() + at));
    }
  });
}

// What the refcounts say is no longer believed: nothing is freed by them.
TEST_F(Qcow2Hostile, NothingIsFreedAfterCorruptionWasFound) {
  on_fiber([&] {
    Bytes image = good_image();
    const uint64_t table = l2_offset(image);
    const uint64_t data = get(image, table) & qcow2::kOffsetMask;
    put(image, table + 8, qcow2::kFlagCopied | 0x200);  // misaligned
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      disk.discard(0, kCluster);
      Bytes to(kCluster);
      const base::SingleBuffer buffer(to.data(), to.size());
      EXPECT_EQ(error_number([&] { disk.read(kCluster, buffer); }), EIO);
    }
    node->close();
    const Bytes after = file->content();
    EXPECT_TRUE(std::equal(after.begin() + static_cast<long>(data),
                           after.begin() + static_cast<long>(data + kCluster),
                           image.begin() + static_cast<long>(data)))
        << "a hole was punched";
    const uint64_t refcounts = get(image, get(image, 48));
    EXPECT_TRUE(std::equal(after.begin() + static_cast<long>(refcounts),
                           after.begin() + static_cast<long>(refcounts + kCluster),
                           image.begin() + static_cast<long>(refcounts)))
        << "a refcount was lowered";
  });
}

// The refcounts say that metadata is free.
TEST_F(Qcow2Hostile, MetadataWithRefcountZeroIsNotGivenOut) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t block = get(good, get(good, 48));
    for (const uint64_t cluster :
         {uint64_t{0}, l1_offset(good) / kCluster, l2_offset(good) / kCluster, block / kCluster}) {
      SCOPED_TRACE(cluster);
      Bytes image = good;
      base::store_be(image.data() + block + cluster * 2, uint16_t{0});
      const Outcome out = use(image);
      EXPECT_EQ(out.read, 0);
      EXPECT_EQ(out.later, EIO);
      EXPECT_GT(corruptions(image), 0U);
    }
  });
}

TEST_F(Qcow2Hostile, BadRefcountTablesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t table = get(good, 48);
    for (const uint64_t entry :
         {uint64_t{0x1200}, uint64_t{0x1001}, uint64_t{1} << 60, uint64_t{0x1000}, get(good, 40)}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, table, entry);
      EXPECT_GT(corruptions(image), 0U);
      const Outcome out = use(image);
      EXPECT_EQ(out.read, 0);
      EXPECT_EQ(out.write, EIO);
    }
  });
}

TEST_F(Qcow2Hostile, AVersion2ImageHasNoZeroFlagAndNoCorruptBit) {
  on_fiber([&] {
    Bytes image = good_image(2);
    put(image, l2_offset(image), qcow2::kFlagZero);
    const Bytes before = image;
    const Outcome out = use(image);
    EXPECT_EQ(out.read, EIO);
    EXPECT_EQ(out.later, EIO);
    EXPECT_EQ(out.image, before);
  });
}

TEST_F(Qcow2Hostile, CompressedGarbageIsAnErrorOfThatClusterOnly) {
  on_fiber([&] {
    Bytes image = good_image();
    const uint64_t data = get(image, l2_offset(image)) & qcow2::kOffsetMask;
    std::fill_n(image.begin() + static_cast<long>(data), kCluster, std::byte{0xff});
    put(image, l2_offset(image), qcow2::kFlagCompressed | uint64_t{3} << 58 | data);
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      Bytes to(kCluster);
      EXPECT_EQ(error_number([&] { disk.read(0, base::SingleBuffer(to.data(), to.size())); }), EIO);
      disk.read(kCluster, base::SingleBuffer(to.data(), to.size()));
      disk.write(kCluster, base::SingleBuffer(to.data(), to.size()));
      disk.write(0, base::SingleBuffer(to.data(), to.size()));  // replaces it as a whole
      disk.read(0, base::SingleBuffer(to.data(), to.size()));
    }
    node->close();
  });
}

TEST_F(Qcow2Hostile, AllL1EntriesNamingOneTableIsCheckedInBoundedTime) {
  on_fiber([&] {
    auto file = make_test_image({.size = uint64_t{1} << 36, .cluster_bits = 9});
    Bytes image = file->content();
    const uint64_t l1 = l1_offset(image);
    const uint64_t entries = base::load_be<uint32_t>(image.data() + 36);
    ASSERT_GT(entries, 1'000'000U);
    const uint64_t table = image.size();
    image.resize(image.size() + 512);
    for (uint64_t i = 0; i < entries; ++i) put(image, l1 + i * 8, table | qcow2::kFlagCopied);
    const auto start = std::chrono::steady_clock::now();
    EXPECT_GE(corruptions(image), entries - 1);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  });
}

TEST_F(Qcow2Hostile, RandomlyDamagedMetadataNeverDoesMoreThanFail) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    const Bytes good = good_image();
    std::mt19937_64 random(seed);
    for (int round = 0; round < 300; ++round) {
      Bytes image = good;
      for (auto flips = 1 + random() % 8; flips > 0; --flips) {
        // The header's fields, the L1 entry, the L2 table, the refcounts: where it hurts.
        const uint64_t places[] = {random() % 112, l1_offset(good) + random() % 8,
                                   l2_offset(good) + random() % 64, get(good, 48) + random() % 8,
                                   get(good, get(good, 48)) + random() % 32};
        image[places[random() % 5]] ^= static_cast<std::byte>(1U << random() % 8);
      }
      if (random() % 4 == 0) image.resize(random() % image.size());
      auto file = std::make_shared<TestFile>();
      file->set_content(image);
      file->most_bytes = 64 << 20;
      try {
        Edge edge(file, "check", {});
        (void)qcow2::check_image(edge, [](const std::string&) {});
      } catch (const base::Error&) {
      }
      try {
        auto node = open_test_image(file);
        {
          Edge disk(node, "guest", Permissions::front_end(true));
          Bytes data(3 * kCluster);
          for (int i = 0; i < 20; ++i) {
            const uint64_t offset = random() % (kDisk - data.size());
            const base::SingleBuffer buffer(data.data(), data.size());
            error_number([&] {
              if (disk.size() < kDisk) return;
              if (i % 3 == 0) disk.read(offset, buffer);
              if (i % 3 == 1) disk.write(i < 6 ? 0 : offset, buffer);
              if (i % 3 == 2) disk.discard(i < 6 ? 0 : offset, data.size());
              if (i % 5 == 0) disk.flush();
            });
          }
        }
        error_number([&] { node->close(); });
      } catch (const base::Error&) {
      }
    }
  });
}

}  // namespace
}  // namespace minivmm::block
