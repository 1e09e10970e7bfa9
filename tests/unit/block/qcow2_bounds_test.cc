// SPDX-License-Identifier: Apache-2.0
// How much an image may ask for: each bound of a list or table, one step past it. Every image here
// is sound but for its size, so it is the bound that refuses it.
#include <gmock/gmock.h>

#include "base/bytes.h"
#include "block/formats/qcow2/bitmaps/bitmap_store.h"
#include "block/formats/qcow2/bitmaps/bitmaps.h"
#include "block/formats/qcow2/listing.h"
#include "block/formats/qcow2/snapshots/snapshot_view.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
using testing::HasSubstr;
constexpr uint64_t kDisk = 4 << 20;

class Qcow2Bounds : public GraphTest {
 protected:
  static std::shared_ptr<TestFile> with_bitmap() {
    auto file = make_test_image({.size = kDisk, .cluster_bits = 12});
    auto node = open_test_image(file);
    node->dirty_bitmaps()->add("b", 4096, true);
    const Bytes data(4096, std::byte{5});
    Edge(node, "guest", Permissions::front_end(true)).write(0, base::SingleBuffer(std::span(data)));
    node->close();
    return file;
  }
  static std::shared_ptr<TestFile> with_snapshot() {
    auto file = make_test_image({.size = kDisk, .cluster_bits = 12});
    auto node = open_test_image(file);
    (void)node->snapshots()->create("one");
    node->close();
    return file;
  }
  static qcow2::Header header_of(const std::shared_ptr<TestFile>& file) {
    Edge edge(file, "look", {});
    return qcow2::read_header(edge);
  }
  // The bitmaps extension's content, in the header.
  static uint64_t bitmaps_extension(const Bytes& image) {
    for (uint64_t at = 104;; at += 8) {
      if (base::load_be<uint32_t>(image.data() + at) == 0x23852875) return at + 8;
    }
  }
  template <typename T>
  static void put(Bytes& image, uint64_t offset, T value) {
    base::store_be(image.data() + offset, value);
  }
};

TEST_F(Qcow2Bounds, MoreBitmapsThanTheFormatAllowsAreRefused) {
  on_fiber([&] {
    auto file = with_bitmap();
    Bytes image = file->content();
    put(image, bitmaps_extension(image), uint32_t{65536});
    file->set_content(image);
    EXPECT_THAT(error_text([&] { (void)header_of(file); }), HasSubstr("65536 bitmaps"));
  });
}

TEST_F(Qcow2Bounds, ALongDirectoryOfBitmapsIsNotRead) {
  on_fiber([&] {
    auto file = with_bitmap();
    Bytes image = file->content();
    const uint64_t extension = bitmaps_extension(image);
    const auto directory = base::load_be<uint64_t>(image.data() + extension + 16);
    for (const uint64_t size : {qcow2::kMaxListBytes, qcow2::kMaxListBytes + 8}) {
      image.resize(directory + size);
      put(image, extension + 8, size);
      file->set_content(image);
      uint64_t longest = 0;
      file->before = [&](TestFile::Op op, uint64_t, uint64_t length) {
        if (op == TestFile::Op::kRead) longest = std::max(longest, length);
      };
      const auto node = open_test_image(file, nullptr, true);
      file->before = nullptr;
      const bool allowed = size <= qcow2::kMaxListBytes;
      EXPECT_EQ(node->dirty_bitmaps()->list().size(), allowed ? 1U : 0U);
      EXPECT_EQ(longest >= size, allowed);
    }
  });
}

// A bitmap that holds more than memory may be taken for is not loaded in part.
TEST_F(Qcow2Bounds, BitmapsTakeNoMoreMemoryThanTheyMay) {
  on_fiber([&] {
    auto file = with_bitmap();
    auto edge = std::make_unique<Edge>(file, "test", Permissions::format_file(true));
    qcow2::Header header = qcow2::read_header(*edge);
    const qcow2::BitmapEntry entry = qcow2::read_bitmaps(*edge, header).at(0);
    const auto sizes =
        qcow2::choose_cache_sizes(header, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
    qcow2::Image image(std::move(edge), nullptr, nullptr, std::move(header), true, "test", sizes);
    qcow2::BitmapStore store(image.file(), image.allocator());
    const uint64_t needed = qcow2::DirtyBits(kDisk, entry.granularity_bits).data_bytes();
    uint64_t left = needed - 1;
    qcow2::DirtyBits bits(kDisk, entry.granularity_bits);
    EXPECT_EQ(error_number([&] { store.read_bits(entry, bits, left); }), EFBIG);
    EXPECT_EQ(left, needed - 1);
    left = needed + 1;
    store.read_bits(entry, bits, left);
    EXPECT_EQ(left, 1U);
    EXPECT_EQ(bits.count(), 1U);
  });
}

TEST_F(Qcow2Bounds, AListOfMoreSnapshotsThanTheFormatAllowsIsRefused) {
  on_fiber([&] {
    auto file = with_snapshot();
    Bytes image = file->content();
    image.resize(image.size() + uint64_t{65537} * 40);  // there is room for them
    for (const uint32_t count : {65536U, 65537U}) {
      put(image, 60, count);
      file->set_content(image);
      const std::string said = error_text([&] { (void)header_of(file); });
      if (count == 65536) {
        EXPECT_EQ(said, "");
      } else {
        EXPECT_THAT(said, HasSubstr("nb_snapshots"));
      }
    }
  });
}

// Few snapshots with long names are a long list, too.
TEST_F(Qcow2Bounds, ALongListOfSnapshotsIsNotReadToItsEnd) {
  on_fiber([&] {
    auto file = with_snapshot();
    Bytes image = file->content();
    const uint64_t list = header_of(file).snapshots_offset;
    constexpr uint32_t kCount = 600;
    constexpr uint64_t kEntry = (40 + 1024 + 65535 + 65535 + 7) & ~uint64_t{7};
    static_assert(kCount * kEntry > qcow2::kMaxListBytes + (8 << 20));
    image.resize(list + kCount * kEntry);
    for (uint32_t i = 0; i < kCount; ++i) {
      put(image, list + i * kEntry + 12, uint16_t{65535});
      put(image, list + i * kEntry + 14, uint16_t{65535});
      put(image, list + i * kEntry + 36, uint32_t{1024});
    }
    put(image, 60, kCount);
    file->set_content(std::move(image));
    const qcow2::Header header = header_of(file);
    Edge edge(file, "look", {});
    EXPECT_THAT(error_text([&] { (void)qcow2::read_snapshots(edge, header); }),
                HasSubstr("longer than"));
  });
}

// For reading a snapshot, and for the changes that walk its tree.
TEST_F(Qcow2Bounds, ALongTableOfASnapshotIsRefused) {
  on_fiber([&] {
    auto file = with_snapshot();
    Bytes image = file->content();
    const uint64_t list = header_of(file).snapshots_offset;
    constexpr uint32_t kMost = qcow2::kMaxL1Bytes / 8;
    // A table without entries, as long as it may be, and room for one that is longer.
    const uint64_t l1 = image.size();
    ASSERT_EQ(l1 % 4096, 0U);
    image.resize(l1 + qcow2::kMaxL1Bytes + 4096);
    put(image, list, l1);
    put(image, list + 8, kMost);
    file->set_content(image);
    const qcow2::SnapshotName one{.either = "one"};
    {
      Edge edge(file, "look", {});
      EXPECT_EQ(qcow2::header_of_snapshot(edge, header_of(file), one).l1_size, kMost);
    }
    put(image, list + 8, kMost + 1);
    file->set_content(image);
    {
      Edge edge(file, "look", {});
      EXPECT_THAT(error_text([&] { (void)qcow2::header_of_snapshot(edge, header_of(file), one); }),
                  HasSubstr("too long"));
    }
    auto node = open_test_image(file);
    EXPECT_THAT(error_text([&] { node->snapshots()->apply("one"); }), HasSubstr("too long"));
    node->close();
  });
}

}  // namespace
}  // namespace minivmm::block
