// SPDX-License-Identifier: Apache-2.0
// Persistent dirty bitmaps: the bits in memory against a plain model; what is written while an
// image is in use is noted, across sessions; a bitmap that a crash may have left behind says so, at
// every moment at which the power may go; images that say nonsense of their bitmaps.
#include <algorithm>
#include <cerrno>
#include <set>

#include <fmt/core.h>

#include "block/formats/qcow2/bitmaps/bitmaps.h"
#include "block/formats/qcow2/check.h"
#include "crash_states.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using qcow2::DirtyBits;

constexpr uint64_t kMiB = 1 << 20;

TEST(DirtyBitsTest, FollowsAModel) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 20; ++round) {
    const unsigned bits = 9 + static_cast<unsigned>(random() % 4);
    const uint64_t grain = 1ULL << bits;
    const uint64_t size = (1 + random() % 90'000) * 512;
    DirtyBits tested(size, bits);
    std::vector<bool> model((size + grain - 1) / grain);
    for (int step = 0; step < 30; ++step) {
      const uint64_t offset = random() % size;
      const uint64_t length = 1 + random() % (random() % 4 == 0 ? size : 8 * grain);
      if (random() % 20 == 0) {
        tested.clear();
        model.assign(model.size(), false);
      } else {
        tested.mark(offset, length);
        const uint64_t last = std::min(offset + length, size) - 1;
        for (uint64_t i = offset >> bits; i <= last >> bits; ++i) model[i] = true;
      }
    }
    ASSERT_EQ(tested.count(), static_cast<uint64_t>(std::count(model.begin(), model.end(), true)));
    // Through its stored form, in pieces of any size.
    std::vector<std::byte> stored(tested.data_bytes() + 5);
    for (uint64_t at = 0; at < stored.size();) {
      const uint64_t now = std::min<uint64_t>(1 + random() % 5000, stored.size() - at);
      tested.store(at, std::span(stored).subspan(at, now));
      at += now;
    }
    DirtyBits copy(size, bits);
    for (uint64_t at = 0; at < stored.size();) {
      const uint64_t now = std::min<uint64_t>(1 + random() % 5000, stored.size() - at);
      copy.load(at, std::span(stored).subspan(at, now));
      at += now;
    }
    DirtyBits coarse(size + grain, bits + 2);
    coarse.merge(copy);
    for (uint64_t at = 0; at < size;) {
      const DirtyBits::Run run = copy.run_at(at, size - at);
      ASSERT_NE(run.length, 0U);
      for (uint64_t i = at; i < at + run.length; i += 512) {
        ASSERT_EQ(model[i >> bits], run.dirty) << i;
        ASSERT_TRUE(!run.dirty || coarse.run_at(i, 1).dirty) << i;
      }
      at += run.length;
      ASSERT_TRUE(at >= size || model[at >> bits] != run.dirty) << "a run ends early at " << at;
    }
    for (uint64_t i = model.size(); i < stored.size() * 8; ++i) {
      ASSERT_EQ((static_cast<unsigned>(stored[i / 8]) >> (i % 8)) & 1, 0U) << "a bit past the end";
    }
  }
}

class Qcow2Bitmap : public GraphTest {
 protected:
  static std::shared_ptr<TestFile> make(uint64_t size = 4 * kMiB, unsigned cluster_bits = 12) {
    return make_test_image({.size = size, .cluster_bits = cluster_bits});
  }
  static void add(const std::shared_ptr<TestFile>& file, const char* name, bool enabled = true) {
    auto node = open_test_image(file);
    node->dirty_bitmaps()->add(name, 4096, enabled);
    node->close();
  }
  static void write(Node& node, uint64_t offset, uint64_t length) {
    Edge disk(node.shared_from_this(), "guest", Permissions::front_end(true), EdgeKind::kRoot);
    const std::vector<std::byte> bytes(length, std::byte{1});
    disk.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
  }
  static std::set<uint64_t> dirty(Node& node, const char* name) {
    std::set<uint64_t> out;
    for (uint64_t at = 0; at < node.size();) {
      const auto status = node.dirty_bitmaps()->status(name, at, node.size() - at);
      for (uint64_t i = at; status.dirty && i < at + status.length; i += 4096) out.insert(i / 4096);
      at += status.length;
    }
    return out;
  }
  static void expect_sound(const std::shared_ptr<TestFile>& file, bool leaks_allowed = false) {
    std::string lines;
    Edge edge(file, "check", {0, Permissions::kWrite | Permissions::kResize});
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    ASSERT_EQ(result.corruptions + result.check_errors, 0U) << lines;
    ASSERT_TRUE(leaks_allowed || result.leaks == 0) << lines;
  }
  // The flags of the first bitmap, as the file has them.
  static uint32_t flags_in(TestFile& file) {
    const auto bytes = file.content();
    const qcow2::Header h = qcow2::parse_header(bytes, bytes.size());
    EXPECT_TRUE(h.bitmaps);
    return base::load_be<uint32_t>(bytes.data() + h.bitmaps->directory_offset +
                                   qcow2::kBitmapFlagsField);
  }
};

TEST_F(Qcow2Bitmap, NotesWritesZeroesAndDiscardsAcrossSessions) {
  on_fiber([&] {
    auto file = make();
    add(file, "on");
    add(file, "off", false);
    {
      auto node = open_test_image(file);
      write(*node, 5000, 100);
      Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      disk.write_zeroes(40960, 8192, {.may_unmap = true});
      disk.discard(81920, 4096);
      EXPECT_EQ(dirty(*node, "on"), (std::set<uint64_t>{1, 10, 11, 20}));
    }
    {
      auto node = open_test_image(file);
      // The first session was not closed: what is in the file is known to be out of date.
      EXPECT_TRUE(node->dirty_bitmaps()->list()[0].inconsistent);
      EXPECT_FALSE(node->dirty_bitmaps()->list()[1].inconsistent) << "it is disabled";
      EXPECT_THROW(node->dirty_bitmaps()->clear("on"), base::Error);
      node->dirty_bitmaps()->remove("on");
      node->dirty_bitmaps()->add("on", 4096, true);
      node->dirty_bitmaps()->set_enabled("off", true);
      write(*node, 0, 1);
      node->close();
    }
    for (int i = 1; i < 4; ++i) {
      auto node = open_test_image(file);
      write(*node, static_cast<uint64_t>(i) * kMiB, 4096);
      node->close();
    }
    auto node = open_test_image(file, nullptr, true);
    const std::set<uint64_t> expected{0, 256, 512, 768};
    EXPECT_EQ(dirty(*node, "on"), expected);
    EXPECT_EQ(dirty(*node, "off"), expected);
    expect_sound(file, true);
  });
}

TEST_F(Qcow2Bitmap, IsMarkedInUseDurablyBeforeTheFirstChange) {
  on_fiber([&] {
    auto file = make();
    add(file, "b");
    EXPECT_EQ(flags_in(*file), qcow2::kBitmapAuto);
    auto node = open_test_image(file);
    bool flushed = false;
    bool marked_first = false;
    file->before = [&](TestFile::Op op, uint64_t, uint64_t length) {
      const bool marked = (flags_in(*file) & qcow2::kBitmapInUse) != 0;
      if (op == TestFile::Op::kFlush && marked) flushed = true;
      if (op == TestFile::Op::kWrite && length == 700) marked_first = flushed;
    };
    write(*node, 0, 700);
    EXPECT_TRUE(marked_first);
    file->before = nullptr;
    node->close();
    EXPECT_EQ(flags_in(*file), qcow2::kBitmapAuto);
    expect_sound(file);
  });
}

// Also those that were not read yet, and those that are off.
TEST_F(Qcow2Bitmap, AResizeKeepsWhatIsDirtyAndWhatIsInside) {
  on_fiber([&] {
    auto file = make();
    add(file, "on");
    add(file, "off");
    const auto resize = [](Node& node, uint64_t size) {
      Edge disk(node.shared_from_this(), "guest", Permissions::front_end(true), EdgeKind::kRoot);
      disk.truncate(size);
    };
    {
      auto node = open_test_image(file);
      write(*node, 0, 4096);
      write(*node, 3 * kMiB, 8192);
      node->dirty_bitmaps()->set_enabled("off", false);
      node->close();
    }
    const std::set<uint64_t> first = {0, 768, 769};
    {
      auto node = open_test_image(file);
      resize(*node, 6 * kMiB + 512);
      write(*node, 6 * kMiB, 512);
      node->close();
    }
    expect_sound(file);
    {
      auto node = open_test_image(file);
      EXPECT_EQ(dirty(*node, "on"), (std::set<uint64_t>{0, 768, 769, 1536}));
      EXPECT_EQ(dirty(*node, "off"), first);
      resize(*node, 3 * kMiB + 4096);
      EXPECT_EQ(dirty(*node, "on"), (std::set<uint64_t>{0, 768}));
      // What comes back is new.
      resize(*node, 4 * kMiB);
      node->close();
    }
    expect_sound(file);
    auto node = open_test_image(file, nullptr, true);
    EXPECT_EQ(dirty(*node, "on"), (std::set<uint64_t>{0, 768}));
    EXPECT_EQ(dirty(*node, "off"), (std::set<uint64_t>{0, 768}));
  });
}

TEST_F(Qcow2Bitmap, EveryPowerCutLeavesAnExactOrAMarkedBitmap) {
  const unsigned states = crash_states(150);
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    auto file = make(16 * kMiB, 9);
    std::set<uint64_t> before;
    {
      auto node = open_test_image(file);
      node->dirty_bitmaps()->add("b", 4096, true);
      for (uint64_t i = 0; i < 4096; i += 7) {
        write(*node, i * 4096, 10);
        before.insert(i);
      }
      node->close();
    }
    std::set<uint64_t> after = before;
    const auto start = file->content();
    file->start_log();
    {
      auto node = open_test_image(file);
      for (uint64_t i = 0; i < 4096; i += 13) {
        write(*node, i * 4096, 10);
        after.insert(i);
      }
      node->dirty_bitmaps()->add("second", 65536, true);
      node->close();
    }
    expect_sound(file);
    std::mt19937_64 random(seed);
    const uint64_t end = file->now();
    unsigned exact = 0;
    for (unsigned i = 0; i < states; ++i) {
      const uint64_t cut = i == 0 ? 0 : end - random() % (i % 2 == 0 ? end : 400);
      SCOPED_TRACE(fmt::format("cut at {} of {}", cut, end));
      auto copy = std::make_shared<TestFile>();
      copy->set_content(cut == 0 ? start : file->after_power_cut(cut, random));
      ASSERT_NO_FATAL_FAILURE(expect_sound(copy, true));
      auto node = open_test_image(copy);
      const auto list = node->dirty_bitmaps()->list();
      ASSERT_GE(list.size(), 1U);
      if (!list[0].inconsistent) {
        const auto found = dirty(*node, "b");
        ASSERT_TRUE(found == before || found == after);
        ++exact;
      }
      node->close();
    }
    EXPECT_GT(exact, 0U);
  });
}

TEST_F(Qcow2Bitmap, AFailureToStoreLeavesItMarkedAndTheImageSound) {
  on_fiber([&] {
    for (unsigned fail_at = 0; fail_at < 12; ++fail_at) {
      SCOPED_TRACE(fail_at);
      auto file = make();
      add(file, "b");
      {
        auto node = open_test_image(file);
        write(*node, 0, 4096);
        node->dirty_bitmaps()->add("c", 512, true);
        unsigned count = 0;
        file->before = [&](TestFile::Op op, uint64_t, uint64_t) {
          if (op != TestFile::Op::kWrite && op != TestFile::Op::kFlush) return;
          if (count++ == fail_at) throw base::Error(EIO, "injected");
        };
        try {
          node->close();
        } catch (const base::Error&) {
        }
        file->before = nullptr;
      }
      expect_sound(file, true);
      auto node = open_test_image(file);
      if (!node->dirty_bitmaps()->list()[0].inconsistent) {
        EXPECT_EQ(dirty(*node, "b"), (std::set<uint64_t>{0}));
      }
      node->close();
    }
  });
}

TEST_F(Qcow2Bitmap, NonsenseCostsTheBitmapsAndNotTheDisk) {
  on_fiber([&] {
    auto file = make();
    add(file, "first");
    add(file, "other");
    const auto good = file->content();
    const qcow2::Header h = qcow2::parse_header(good, good.size());
    const uint64_t directory = h.bitmaps->directory_offset;
    struct Damage {
      uint64_t at;
      std::vector<uint8_t> bytes;
      bool directory_lost;
    };
    const uint64_t second = directory + 24 + 8;
    const Damage damages[] = {
        {directory + 18, {0xff, 0xff}, true},              // a name without end
        {directory + 18, {0, 0}, true},                    // no name
        {directory + 20, {0xff, 0xff, 0xff, 0xf0}, true},  // extra data without end
        {second + 24, {'f', 'i', 'r', 's', 't'}, true},    // two of one name
        {directory, {0, 0, 0, 0, 0x7f, 0, 0, 0}, false},   // a table past the end
        {directory + 1, {0, 0, 0, 0, 0, 0, 1}, false},     // and one misaligned
        {directory + 8, {0xff, 0xff, 0xff, 0xff}, false},  // of any size
        {directory + 8, {0, 0, 0, 0}, false},              // of none
        {directory + 16, {7}, false},                      // of what kind?
        {directory + 17, {63}, false},                     // of what granularity?
        {directory + 12, {0x80, 0, 0, 2}, false},          // an unknown flag
    };
    for (const Damage& damage : damages) {
      SCOPED_TRACE(fmt::format("{:#x}", damage.at - directory));
      auto bytes = good;
      for (size_t i = 0; i < damage.bytes.size(); ++i) {
        bytes[damage.at + i] = std::byte{damage.bytes[i]};
      }
      auto copy = std::make_shared<TestFile>();
      copy->set_content(bytes);
      auto node = open_test_image(copy);
      const auto list = node->dirty_bitmaps()->list();
      if (damage.directory_lost) {
        EXPECT_TRUE(list.empty());
        EXPECT_THROW(node->dirty_bitmaps()->add("new", 0, true), base::Error);
      } else {
        ASSERT_EQ(list.size(), 2U);
        EXPECT_TRUE(list[0].inconsistent);
        EXPECT_THROW((void)node->dirty_bitmaps()->status("first", 0, 1), base::Error);
        EXPECT_FALSE(list[1].inconsistent);
      }
      write(*node, 0, 4096);
      node->close();
      const auto left = copy->content();
      const qcow2::Header now = qcow2::parse_header(left, left.size());
      EXPECT_EQ((now.autoclear & qcow2::kAutoclearBitmaps) == 0, damage.directory_lost);
    }
  });
}

TEST_F(Qcow2Bitmap, TheLastOneToGoTakesTheExtensionWithIt) {
  on_fiber([&] {
    auto file = make();
    add(file, "a");
    add(file, "b");
    for (const char* name : {"a", "b"}) {
      auto node = open_test_image(file);
      EXPECT_THROW(node->dirty_bitmaps()->remove("c"), base::Error);
      node->dirty_bitmaps()->remove(name);
      node->close();
      expect_sound(file);
    }
    const auto bytes = file->content();
    const qcow2::Header h = qcow2::parse_header(bytes, bytes.size());
    EXPECT_FALSE(h.bitmaps);
    EXPECT_EQ(h.autoclear, 0U);
    EXPECT_TRUE(h.unknown_extensions.empty());
  });
}

}  // namespace
}  // namespace minivmm::block
