// SPDX-License-Identifier: Apache-2.0
// The raw driver: its range, growth, and the guard of disks that were only guessed to be raw.
#include "block/formats/raw.h"

#include <string>

#include <functional>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/event_loop.h"
#include "base/sync.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;
using testing::HasSubstr;

constexpr std::string_view kQcow2("QFI\xfb\0\0\0\3", 8);

// A file in memory that suspends in each request, and calls before it takes a write's bytes.
class SlowFile final : public Node {
 public:
  explicit SlowFile(size_t size, char fill = 0) : Node("slow", "test", false), bytes(size, fill) {
    set_size(size);
    set_limits({.can_discard = true});
  }
  std::string bytes;
  std::function<void()> before_copy = [] {};

 private:
  void driver_read(uint64_t offset, IoSpan to) override {
    base::EventLoop::current()->yield();
    base::copy_to(to, 0, std::as_bytes(std::span(bytes)).subspan(offset, to.bytes()));
  }
  void driver_write(uint64_t offset, IoSpan from, WriteFlags) override {
    base::EventLoop::current()->yield();
    before_copy();
    if (bytes.size() < offset + from.bytes()) bytes.resize(offset + from.bytes());
    base::copy_from(from, 0,
                    std::as_writable_bytes(std::span(bytes)).subspan(offset, from.bytes()));
    grow_size(bytes.size());
  }
  void driver_discard(uint64_t offset, uint64_t length) override {
    bytes.replace(offset, length, length, '\0');
  }
  void driver_flush() override {}
};

class RawTest : public GraphTest {
 protected:
  std::shared_ptr<RawNode> raw(RawRange range = {}, bool probed = false) {
    return std::make_shared<RawNode>(NodeConfig{"r", false}, file_, range, probed);
  }
  std::shared_ptr<SlowFile> file_ = std::make_shared<SlowFile>(8192);
};

SingleBuffer text(std::string_view bytes) { return {bytes.data(), bytes.size()}; }

// As qcow2 on raw does: what it appends must be there when it is read again.
TEST_F(RawTest, WritesPastTheEndMakeItGrow) {
  on_fiber([&] {
    auto node = raw({.offset = 512, .size = {}});
    Edge edge(node, "a format", Permissions::format_file(true));
    edge.write(8000, text("appended"));
    EXPECT_EQ(edge.size(), 8008U);
    std::string got(8, '?');
    edge.read(8000, SingleBuffer(got.data(), got.size()));
    EXPECT_EQ(got, "appended");
    edge.write_zeroes(8008, 92);
    EXPECT_EQ(edge.size(), 8100U);
  });
}

TEST_F(RawTest, AFixedSizeIsNotLeft) {
  file_->bytes.replace(4096, 9, "neighbour");
  on_fiber([&] {
    auto node = raw({.offset = 0, .size = 4096});
    Edge edge(node, "a format", Permissions::format_file(true));
    EXPECT_EQ(error_number([&] { edge.write(4090, text("too long")); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.write_zeroes(4096, 16); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.truncate(5000); }), ENOTSUP);
    EXPECT_EQ(edge.size(), 4096U);
  });
  EXPECT_EQ(file_->bytes.substr(4096, 9), "neighbour");
}

class GuardTest : public RawTest {
 protected:
  // What a front end does with the guessed disk.
  template <typename Body>
  void with_disk(Body body) {
    on_fiber([&] {
      auto node = raw({}, true);
      Edge edge(node, "a guest", Permissions::front_end(true), EdgeKind::kRoot);
      body(edge);
    });
  }
};

TEST_F(GuardTest, AHeaderOfAnotherFormatIsRefusedWholeOrInParts) {
  with_disk([&](Edge& edge) {
    EXPECT_THAT(error_text([&] { edge.write(0, text(kQcow2)); }),
                HasSubstr("would make it look like a qcow2 image"));
    std::string sectors(2048, '\0');
    sectors.replace(0, kQcow2.size(), kQcow2);
    EXPECT_EQ(error_number([&] { edge.write(0, text(sectors)); }), EPERM);
    edge.write(1, text("FI\xfb"));
    EXPECT_EQ(error_number([&] { edge.write(0, text("Q")); }), EPERM);
    edge.write(600, text(kQcow2));  // only the beginning is looked at
  });
  EXPECT_EQ(file_->bytes.substr(0, 4), std::string("\0FI\xfb", 4));
}

// Zeroes are bytes too.
TEST_F(GuardTest, ZeroesCannotCompleteAHeader) {
  with_disk([&](Edge& edge) {
    edge.write(0, text("QEDx"));
    EXPECT_EQ(error_number([&] { edge.write_zeroes(3, 1); }), EPERM);
    EXPECT_EQ(error_number([&] { edge.write_zeroes(3, 4000); }), EPERM);
    edge.discard(3, 1);
    edge.write_zeroes(0, 4096);
  });
  EXPECT_EQ(file_->bytes, std::string(8192, '\0'));
}

// The guest's memory is the guest's: what was looked at must be what is written.
TEST_F(GuardTest, AGuestThatChangesItsBufferAfterTheLookChangesNothing) {
  std::string buffer(4096, 'i');
  file_->before_copy = [&] { buffer.replace(0, kQcow2.size(), kQcow2); };
  with_disk([&](Edge& edge) { edge.write(0, text(buffer)); });
  EXPECT_EQ(file_->bytes.substr(0, 8), "iiiiiiii");
}

TEST_F(GuardTest, TwoHalvesWrittenAtOnceDoNotMakeAHeader) {
  int refused = 0;
  with_disk([&](Edge& edge) {
    base::WaitGroup group;
    group.add(2);
    const auto start = [&](uint64_t offset, std::string_view half) {
      base::EventLoop::current()->spawn("writer", [&, offset, half] {
        refused += error_number([&] { edge.write(offset, text(half)); }) == EPERM;
        group.done();
      });
    };
    start(0, "QF");
    start(2, "I\xfb");
    group.wait();
  });
  EXPECT_EQ(refused, 1);
  EXPECT_NE(file_->bytes.substr(0, 4), "QFI\xfb");
}

TEST_F(GuardTest, ADiskSmallerThanASectorIsGuardedToo) {
  file_ = std::make_shared<SlowFile>(100);
  with_disk([&](Edge& edge) {
    EXPECT_EQ(error_number([&] { edge.write(0, text(kQcow2)); }), EPERM);
    edge.write(96, text("last"));
    edge.write_zeroes(0, 100);
  });
  EXPECT_EQ(file_->bytes, std::string(100, '\0'));
}

}  // namespace
}  // namespace minivmm::block
