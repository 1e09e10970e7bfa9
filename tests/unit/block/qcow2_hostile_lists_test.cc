// SPDX-License-Identifier: Apache-2.0
// Lists beside the disk that lie: bitmaps and snapshots. What they claim is checked before anything
// is read or allocated for it.
#include <gmock/gmock.h>

#include "base/bytes.h"
#include "block/formats/qcow2/bitmaps/bitmap_store.h"
#include "block/formats/qcow2/listing.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
using qcow2::BitmapEntry;
using testing::HasSubstr;
constexpr uint64_t kDisk = 4 << 20;

class Qcow2HostileLists : public GraphTest {
 protected:
  // With a bitmap that has something in it, and a snapshot.
  static std::shared_ptr<TestFile> make() {
    auto file = make_test_image({.size = kDisk, .cluster_bits = 12});
    auto node = open_test_image(file);
    (void)node->snapshots()->create("one");
    node->dirty_bitmaps()->add("b", 4096, true);
    const Bytes data(4096, std::byte{5});
    Edge(node, "guest", Permissions::front_end(true)).write(0, base::SingleBuffer(std::span(data)));
    node->close();
    return file;
  }
  static qcow2::Header header_of(const std::shared_ptr<TestFile>& file) {
    Edge edge(file, "look", {});
    return qcow2::read_header(edge);
  }
  template <typename T>
  static void put(const std::shared_ptr<TestFile>& file, uint64_t offset, T value) {
    Bytes image = file->content();
    base::store_be(image.data() + offset, value);
    file->set_content(std::move(image));
  }
};

TEST(Qcow2BitmapProblem, NamesWhatMakesNoSense) {
  const qcow2::Geometry g{.cluster_bits = 12, .refcount_order = 4, .version = 3};
  constexpr uint64_t kFile = 1 << 20;
  BitmapEntry good;
  good.table_offset = 8192;
  good.table_size = 1;
  good.type = 1;
  good.granularity_bits = 16;
  const auto problem = [&](auto&& change) {
    BitmapEntry entry = good;
    change(entry);
    const char* found = qcow2::bitmap_problem(entry, g, kDisk, kFile);
    return std::string(found != nullptr ? found : "");
  };
  EXPECT_EQ(problem([](BitmapEntry&) {}), "");
  EXPECT_THAT(problem([](BitmapEntry& e) { e.type = 2; }), HasSubstr("type"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.flags = 8; }), HasSubstr("flags"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.extra_bytes = 8; }), HasSubstr("extra data"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.granularity_bits = 8; }), HasSubstr("granularity"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.granularity_bits = 32; }), HasSubstr("granularity"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.table_size = 0; }), HasSubstr("size"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.table_size = ~0U; }), HasSubstr("size"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.table_offset = 0; }), HasSubstr("misaligned"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.table_offset = 512; }), HasSubstr("misaligned"));
  EXPECT_THAT(problem([](BitmapEntry& e) { e.table_offset = kFile; }), HasSubstr("past the end"));
  EXPECT_EQ(problem([](BitmapEntry& e) { e.granularity_bits = 9; }), "");
  const qcow2::Geometry small{.cluster_bits = 9, .refcount_order = 4, .version = 3};
  good.granularity_bits = 9;
  EXPECT_THAT(std::string(qcow2::bitmap_problem(good, small, kDisk, kFile)),
              HasSubstr("smaller than the disk"));
}

// Behind the end of the file there are only zeroes: "nothing was written".
TEST_F(Qcow2HostileLists, ABitmapWhoseDataIsNotThereIsNotBelieved) {
  on_fiber([&] {
    const auto file = make();
    uint64_t table = 0;
    {
      Edge edge(file, "look", {});
      table = qcow2::read_bitmaps(edge, qcow2::read_header(edge)).at(0).table_offset;
    }
    {
      const auto node = open_test_image(file, nullptr, true);
      EXPECT_TRUE(node->dirty_bitmaps()->status("b", 0, 4096).dirty);
    }
    put(file, table, uint64_t{1} << 40);
    const auto node = open_test_image(file, nullptr, true);
    EXPECT_EQ(error_number([&] { (void)node->dirty_bitmaps()->status("b", 0, 4096); }), EINVAL);
  });
}

TEST_F(Qcow2HostileLists, ASnapshotWithEndlessExtraDataIsRefused) {
  on_fiber([&] {
    const auto file = make();
    Bytes image = file->content();
    image.resize(image.size() + (1 << 20));
    file->set_content(image);
    const qcow2::Header header = header_of(file);
    put(file, header.snapshots_offset + 36, uint32_t{512 << 10});
    Edge edge(file, "look", {});
    EXPECT_THAT(error_text([&] { (void)qcow2::read_snapshots(edge, header); }),
                HasSubstr("too long"));
  });
}

// To follow it once for each entry would count what it holds as often.
TEST_F(Qcow2HostileLists, ATableThatTwoEntriesNameIsInNoSnapshot) {
  on_fiber([&] {
    const auto file = make();
    const uint64_t l1 = header_of(file).l1_offset;
    put(file, l1 + 8, base::load_be<uint64_t>(file->content().data() + l1));
    const Bytes before = file->content();
    auto node = open_test_image(file);
    EXPECT_THAT(error_text([&] { (void)node->snapshots()->create("two"); }),
                HasSubstr("is used twice"));
    node->close();
    node.reset();  // its edge lets go of the file
    const qcow2::Header header = header_of(file);
    EXPECT_EQ(header.snapshots, 1U);
    EXPECT_EQ(header.l1_offset, l1);
  });
}

}  // namespace
}  // namespace minivmm::block
