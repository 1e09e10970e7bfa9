// SPDX-License-Identifier: Apache-2.0
// The header of an open image is changed: what is not known stays, what was there before is found
// again, and an error leaves a header that the next change makes right.
#include <cerrno>

#include <fmt/core.h>

#include "block/formats/qcow2/header_update.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using qcow2::Header;
using qcow2::HeaderUpdate;

class Qcow2HeaderUpdate : public GraphTest {
 protected:
  // An image with an extension nobody knows and fields behind those of the specification.
  void make() {
    file_ = make_test_image(
        {.size = 1 << 20, .cluster_bits = 12, .backing_file = "base.img", .backing_format = "raw"});
    Edge edge(file_, "test", Permissions::format_file(true));
    Header h = qcow2::read_header(edge);
    h.header_length = 128;
    h.more_fields.assign(23, std::byte{0x5a});
    h.unknown_extensions.push_back({0x12345678, std::vector<std::byte>(13, std::byte{7})});
    edge.write(0, base::SingleBuffer(std::span<const std::byte>(qcow2::serialise_header(h))));
  }
  static void expect_kept(const Header& h) {
    EXPECT_EQ(h.header_length, 128U);
    EXPECT_EQ(h.more_fields, std::vector<std::byte>(23, std::byte{0x5a}));
    ASSERT_EQ(h.unknown_extensions.size(), 1U);
    EXPECT_EQ(h.unknown_extensions[0].type, 0x12345678U);
    EXPECT_EQ(h.unknown_extensions[0].data, std::vector<std::byte>(13, std::byte{7}));
  }
  std::shared_ptr<TestFile> file_;
};

TEST_F(Qcow2HeaderUpdate, NumbersAreWrittenInOneSectorAndNothingElseIs) {
  on_fiber([&] {
    make();
    Edge edge(file_, "test", Permissions::format_file(true));
    HeaderUpdate update(edge, qcow2::read_header(edge));
    const auto before = file_->content();
    uint64_t writes = 0;
    file_->before = [&](TestFile::Op op, uint64_t offset, uint64_t length) {
      if (op != TestFile::Op::kWrite) return;
      ++writes;
      EXPECT_LE(offset + length, 512U) << "a crash could tear it";
    };
    update.change_numbers([](Header& h) {
      h.size = 2 << 20;
      h.autoclear = 0x80;
    });
    EXPECT_EQ(writes, 1U);
    auto expected = before;
    base::store_be(expected.data() + 24, uint64_t{2 << 20});
    base::store_be(expected.data() + 88, uint64_t{0x80});
    EXPECT_EQ(file_->content(), expected);
  });
}

TEST_F(Qcow2HeaderUpdate, ARewriteKeepsWhatItDoesNotKnow) {
  on_fiber([&] {
    make();
    Edge edge(file_, "test", Permissions::format_file(true));
    HeaderUpdate update(edge, qcow2::read_header(edge));
    update.change_numbers([](Header& h) { h.size = 3 << 19; });
    update.rewrite([](Header& h) { h.backing_file = "another-and-longer-name.img"; });
    update.rewrite([](Header& h) { h.unknown_extensions.push_back({0x777, {}}); });
    update.rewrite([](Header& h) {
      h.unknown_extensions.pop_back();
      h.backing_file = "b";
    });
    const Header h = qcow2::read_header(edge);
    expect_kept(h);
    EXPECT_EQ(h.size, uint64_t{3 << 19}) << "an earlier change of a number was undone";
    EXPECT_EQ(h.backing_file, "b");
    EXPECT_EQ(h.backing_format, "raw");
  });
}

// With the extensions that QEMU writes a header is longer than a sector, and what follows moves
// when bitmaps come and go.
TEST_F(Qcow2HeaderUpdate, APowerCutInARewriteLeavesTheOldOrTheNewOne) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  on_fiber([&] {
    for (const size_t features : {0, 3, 7, 8, 9}) {
      SCOPED_TRACE(features);
      file_ = make_test_image({.size = 1 << 20,
                               .cluster_bits = 16,
                               .backing_file = std::string(200, 'b'),
                               .backing_format = "qcow2"});
      Edge edge(file_, "test", Permissions::format_file(true));
      Header first = qcow2::read_header(edge);
      first.feature_names.assign(features, {.type = 0, .bit = 1, .name = "a feature"});
      edge.write(0, base::SingleBuffer(std::span<const std::byte>(qcow2::serialise_header(first))));
      HeaderUpdate update(edge, qcow2::read_header(edge));
      file_->start_log();
      for (int turn = 0; turn < 3; ++turn) {
        update.rewrite([&](Header& h) {
          h.bitmaps = qcow2::BitmapsExtension{1, 64, uint64_t{65536} * 2};
          h.autoclear |= qcow2::kAutoclearBitmaps;
        });
        update.rewrite([&](Header& h) { h.bitmaps->directory_size = 128; });
        update.rewrite([&](Header& h) {
          h.bitmaps.reset();
          h.autoclear = 0;
        });
      }
      const uint64_t end = file_->now();
      for (int i = 0; i < 200; ++i) {
        const uint64_t cut = random() % (end + 1);
        auto bytes = file_->after_power_cut(cut, random);
        bytes.resize(std::max<size_t>(bytes.size(), 65536 * 5));
        Header h;
        ASSERT_NO_THROW(h = qcow2::parse_header(std::span(bytes).first(65536), bytes.size()));
        ASSERT_EQ(h.backing_file, std::string(200, 'b'));
        ASSERT_EQ(h.backing_format, "qcow2");
        ASSERT_TRUE(h.unknown_extensions.size() <= 1);
        if (h.bitmaps) {
          ASSERT_EQ(h.bitmaps->count, 1U);
          ASSERT_EQ(h.bitmaps->directory_offset, 65536U * 2);
          ASSERT_TRUE(h.bitmaps->directory_size == 64 || h.bitmaps->directory_size == 128);
        }
      }
    }
  });
}

TEST_F(Qcow2HeaderUpdate, AHeaderThatDoesNotFitIsNotWritten) {
  on_fiber([&] {
    make();
    Edge edge(file_, "test", Permissions::format_file(true));
    HeaderUpdate update(edge, qcow2::read_header(edge));
    const auto before = file_->content();
    EXPECT_THROW(update.rewrite([](Header& h) {
      h.unknown_extensions.push_back({0x777, std::vector<std::byte>(4096)});
    }),
                 base::Error);
    EXPECT_EQ(file_->content(), before);
    EXPECT_EQ(update.current().unknown_extensions.size(), 1U);
  });
}

TEST_F(Qcow2HeaderUpdate, AFailedChangeIsForgotten) {
  on_fiber([&] {
    make();
    Edge edge(file_, "test", Permissions::format_file(true));
    HeaderUpdate update(edge, qcow2::read_header(edge));
    file_->before = [](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kFlush) throw base::Error(EIO, "no flush");
    };
    // It was written and may or may not last.
    EXPECT_THROW(update.change_numbers([](Header& h) { h.size = 5 << 20; }), base::Error);
    file_->before = nullptr;
    update.change_numbers([](Header& h) { h.autoclear = 0x40; });
    const Header h = qcow2::read_header(edge);
    EXPECT_EQ(h.size, uint64_t{1 << 20});
    EXPECT_EQ(h.autoclear, 0x40U);
  });
}

}  // namespace
}  // namespace minivmm::block
