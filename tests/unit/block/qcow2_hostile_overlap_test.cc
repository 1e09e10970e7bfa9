// SPDX-License-Identifier: Apache-2.0
// Images whose tables claim what other metadata lies in: nothing of it is overwritten or freed.
#include <chrono>

#include <fmt/core.h>

#include "base/checked.h"
#include "block/formats/qcow2/listing.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "qcow2_hostile.h"

namespace minivmm::block {
namespace {

class Qcow2FarTable : public Qcow2Hostile {
 protected:
  // The file after a write was refused and the image, which is corrupt then, was closed.
  static Bytes after_refused_write(const Bytes& image) {
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
    return file->content();
  }
};

// A shared table that is not there: a copy of it would be empty, and the disk with it.
TEST_F(Qcow2FarTable, IsNotCopied) {
  on_fiber([&] {
    Bytes image = good_image();
    put(image, l1_offset(image), uint64_t{1} << 40);
    EXPECT_EQ(get(after_refused_write(image), l1_offset(image)), uint64_t{1} << 40);
  });
}

// The file grows until data would lie where the table is said to be: the guest would write its own
// entries.
TEST_F(Qcow2FarTable, IsNotWrittenOver) {
  on_fiber([&] {
    Bytes image = good_image();
    image.resize(base::align_up<uint64_t>(image.size(), kCluster));
    put(image, l1_offset(image) + 8, image.size() | qcow2::kFlagCopied);
    EXPECT_EQ(after_refused_write(image).size(), image.size());
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

}  // namespace
}  // namespace minivmm::block
