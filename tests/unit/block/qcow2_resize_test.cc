// SPDX-License-Identifier: Apache-2.0
// Resizing while the disk is in use: what the disk grows by reads as zeroes whatever lies there,
// what it shrinks by is given back, the L1 table moves under running requests, and a power cut at
// any moment leaves a sound image of one size or the other.
#include <cerrno>

#include <fmt/core.h>

#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "crash_states.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  bool extended_l2 = false;
};

qcow2::CreateOptions options_of(const Case& c, uint64_t size) {
  return {.size = size,
          .version = c.version,
          .cluster_bits = c.cluster_bits,
          .refcount_order = c.refcount_order,
          .extended_l2 = c.extended_l2};
}

void expect_consistent(const std::shared_ptr<Node>& file, bool leaks_allowed = false) {
  std::string lines;
  Edge edge(file, "check", {0, Permissions::kWrite | Permissions::kResize});
  const auto result =
      qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
  ASSERT_EQ(result.corruptions, 0U) << lines;
  ASSERT_EQ(result.check_errors, 0U) << lines;
  if (leaks_allowed) return;
  ASSERT_EQ(result.leaks, 0U) << lines;
}

std::vector<std::byte> read_all(Edge& disk) {
  std::vector<std::byte> out(disk.size());
  if (!out.empty()) disk.read(0, base::SingleBuffer(out.data(), out.size()));
  return out;
}

void write_to(Edge& disk, uint64_t offset, const std::vector<std::byte>& bytes) {
  disk.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
}

class Qcow2ResizeFormats : public GraphTest, public testing::WithParamInterface<Case> {};

// Against a model, with what the disk holds written at random; and opened anew
// now and then.
TEST_P(Qcow2ResizeFormats, RandomResizesMatchAModel) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    std::mt19937_64 random(seed);
    constexpr uint64_t kMost = 6 << 20;
    std::vector<std::byte> model(512 * (random() % 100));
    auto file = make_test_image(options_of(GetParam(), model.size()));
    auto node = open_test_image(file);
    auto disk =
        std::make_unique<Edge>(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
    for (int step = 0; step < 120; ++step) {
      const auto kind = random() % 8;
      if (kind < 3) {
        const uint64_t size = 512 * (random() % ((random() % 4 == 0 ? kMost : kMost / 16) / 512));
        disk->truncate(size);
        model.resize(size);
        ASSERT_EQ(disk->size(), size);
      } else if (kind < 6 && !model.empty()) {
        const uint64_t offset = random() % model.size();
        const auto bytes = pattern_bytes(
            1 + random() % std::min<uint64_t>(model.size() - offset, 40000), random());
        write_to(*disk, offset, bytes);
        std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<long>(offset));
      } else if (kind == 6 && !model.empty()) {
        const uint64_t offset = random() % model.size();
        const uint64_t length = 1 + random() % (model.size() - offset);
        disk->write_zeroes(offset, length, {.may_unmap = random() % 2 == 0});
        std::fill_n(model.begin() + static_cast<long>(offset), length, std::byte{0});
      } else if (kind == 7 && random() % 4 == 0) {
        disk.reset();
        node->close();
        node.reset();
        expect_consistent(file);
        node = open_test_image(file);
        disk = std::make_unique<Edge>(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      }
      ASSERT_EQ(disk->size(), model.size());
      ASSERT_EQ(read_all(*disk), model) << "after step " << step;
    }
    disk.reset();
    node->close();
    expect_consistent(file);
  });
}

// Writers on both loops go on in the part that stays, while the disk grows and shrinks; others
// write where the end has just been or is about to be, and what they write behind it leaks nothing.
TEST_P(Qcow2ResizeFormats, RequestsGoOnMeanwhile) {
  on_fiber([&] {
    constexpr uint64_t kStays = 256 * 1024;
    auto file = make_test_image(options_of(GetParam(), kStays));
    file->after = [](TestFile::Op, uint64_t offset, uint64_t) {
      for (uint64_t i = offset / 512 % 3; i > 0; --i) base::EventLoop::current()->yield();
    };
    auto node = open_test_image(file, nullptr, false, 8192);
    {
      Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      base::WaitGroup running;
      std::atomic<unsigned> wrong{0};
      for (unsigned i = 0; i < 4; ++i) {
        running.add();
        loops_.loop(i % 2).post("writer", [&, i] {
          std::mt19937_64 random(i);
          const uint64_t begin = i * kStays / 4;
          std::vector<std::byte> mine(kStays / 4);
          for (int n = 0; n < 150; ++n) {
            const uint64_t at = random() % mine.size();
            const auto bytes =
                pattern_bytes(1 + random() % std::min<uint64_t>(mine.size() - at, 9000), random());
            write_to(disk, begin + at, bytes);
            std::copy(bytes.begin(), bytes.end(), mine.begin() + static_cast<long>(at));
            if (n % 16 == 0) disk.flush();
            std::vector<std::byte> got(mine.size());
            disk.read(begin, base::SingleBuffer(got.data(), got.size()));
            if (got != mine) ++wrong;
          }
          running.done();
        });
      }
      std::atomic<bool> resized{false};
      for (unsigned i = 0; i < 2; ++i) {
        running.add();
        loops_.loop(i % 2).post("late writer", [&, i] {
          std::mt19937_64 random(i + 50);
          while (!resized) {
            const uint64_t at = kStays + random() % 4'500'000;
            const auto bytes = pattern_bytes(1 + random() % 9000, random());
            try {
              if (random() % 3 != 0) {
                write_to(disk, at, bytes);
              } else {
                disk.write_zeroes(at, disk.size() > at ? disk.size() - at : 1, {});
              }
            } catch (const base::Error& e) {
              if (e.err() != ENOSPC) ++wrong;
            }
            base::EventLoop::current()->yield();
          }
          running.done();
        });
      }
      std::mt19937_64 random(99);
      for (int n = 0; n < 60; ++n) {
        disk.truncate(kStays + 512 * (random() % 9000));
        if (disk.size() > kStays + 70000) write_to(disk, kStays, pattern_bytes(70000, 1));
      }
      resized = true;
      running.wait();
      EXPECT_EQ(wrong.load(), 0U);
    }
    node->close();
    expect_consistent(file);
  });
}

TEST_P(Qcow2ResizeFormats, APowerCutLeavesOneSizeOrTheOther) {
  const unsigned states = crash_states(60);
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    constexpr uint64_t kStays = 128 * 1024;
    auto file = make_test_image(options_of(GetParam(), kStays));
    std::mt19937_64 random(seed);
    const auto base_content = pattern_bytes(kStays, seed);
    const std::vector<std::byte> fill(30000, std::byte{0x77});
    std::vector<uint64_t> sizes{kStays};
    {
      auto node = open_test_image(file);
      {
        Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
        write_to(disk, 0, base_content);
        disk.flush();
        file->start_log();
        for (int n = 0; n < 25; ++n) {
          const uint64_t size = kStays + 512 * (random() % 10000);
          sizes.push_back(size);
          disk.truncate(size);
          if (size > kStays + fill.size()) {
            write_to(disk, size - fill.size(), fill);
            write_to(disk, kStays + random() % (size - kStays - fill.size() + 1), fill);
          }
          if (n % 3 == 0) disk.flush();
        }
      }
      node->close();
    }
    const uint64_t end = file->now();
    for (unsigned i = 0; i < states && !HasFatalFailure(); ++i) {
      const uint64_t cut = i == 0 ? end : random() % (end + 1);
      SCOPED_TRACE(fmt::format("cut {} of {}", cut, end));
      auto after = std::make_shared<TestFile>();
      after->set_content(file->after_power_cut(cut, random));
      expect_consistent(after, true);
      auto node = open_test_image(after);
      {
        Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
        ASSERT_NE(std::find(sizes.begin(), sizes.end(), disk.size()), sizes.end()) << disk.size();
        const auto content = read_all(disk);
        ASSERT_TRUE(std::equal(base_content.begin(), base_content.end(), content.begin()));
        for (size_t k = kStays; k < content.size(); ++k) {
          ASSERT_TRUE(content[k] == std::byte{0} || content[k] == std::byte{0x77}) << k;
        }
        // It can be resized again, and nothing that was given up comes back.
        disk.truncate(8 << 20);
        const auto grown = read_all(disk);
        ASSERT_TRUE(std::equal(content.begin(), content.end(), grown.begin()));
        ASSERT_TRUE(base::is_zero(std::span(grown).subspan(content.size())));
      }
      node->close();
      expect_consistent(after, true);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Formats, Qcow2ResizeFormats,
                         testing::Values(Case{"v3_512", 3, 9, 4}, Case{"v3_4k", 3, 12, 4},
                                         Case{"v2_1k", 2, 10, 4}, Case{"v3_64k", 3, 16, 4},
                                         Case{"v3_512_wide_refcounts", 3, 9, 6},
                                         Case{"v3_16k_extended", 3, 14, 4, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

class Qcow2Resize : public GraphTest {};

// A backing file that is longer than the disk must not show where the disk
// grows.
TEST_F(Qcow2Resize, ALongerBackingFileDoesNotComeToLight) {
  for (const unsigned version : {2U, 3U}) {
    for (const uint64_t size : {uint64_t{0}, uint64_t{70 * 512}, uint64_t{65536}}) {
      SCOPED_TRACE(fmt::format("version {}, size {}", version, size));
      on_fiber([&] {
        auto below = std::make_shared<TestFile>();
        below->set_content(std::vector<std::byte>(200000, std::byte{0xbb}));
        auto file = make_test_image({.size = size,
                                     .version = version,
                                     .cluster_bits = 12,
                                     .backing_file = "below",
                                     .backing_format = "raw"});
        auto node = open_test_image(file, below);
        {
          Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
          disk.truncate(1 << 20);
          const auto content = read_all(disk);
          for (size_t i = 0; i < content.size(); ++i) {
            ASSERT_EQ(content[i], i < size ? std::byte{0xbb} : std::byte{0}) << i;
          }
          // Shrunk and grown again: the backing file stays hidden.
          disk.truncate(4096);
          disk.truncate(100 * 1024);
          const auto again = read_all(disk);
          for (size_t i = 0; i < again.size(); ++i) {
            ASSERT_EQ(again[i], i < std::min<uint64_t>(size, 4096) ? std::byte{0xbb} : std::byte{0})
                << i;
          }
        }
        node->close();
        expect_consistent(file);
      });
    }
  }
}

// Refcount blocks of 64 entries have no room for a table of 512 clusters beside
// themselves.
TEST_F(Qcow2Resize, ATableThatNoFreeRunCanHold) {
  on_fiber([&] {
    auto file = make_test_image({.size = 1 << 20, .cluster_bits = 9, .refcount_order = 6});
    auto node = open_test_image(file);
    const auto bytes = pattern_bytes(5000, 3);
    {
      Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      write_to(disk, 1000, bytes);
      disk.truncate(1 << 30);
      write_to(disk, (1 << 30) - 5000, bytes);
    }
    node->close();
    expect_consistent(file);
    node.reset();
    node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(false), EdgeKind::kRoot);
      for (const uint64_t at : {uint64_t{1000}, uint64_t{(1 << 30) - 5000}}) {
        std::vector<std::byte> got(bytes.size());
        disk.read(at, base::SingleBuffer(got.data(), got.size()));
        EXPECT_EQ(got, bytes);
      }
    }
    node->close();
  });
}

TEST_F(Qcow2Resize, ShrinkingFreesWhatLayBehindTheEnd) {
  on_fiber([&] {
    auto file = make_test_image({.size = 8 << 20, .cluster_bits = 12});
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      const auto bytes = pattern_bytes(1 << 20, 4);
      // When truncate returns the space is free to be used again: the file does not grow with each
      // turn. (What is freed in the background would have to wait here: this file never suspends.)
      uint64_t first_size = 0;
      for (int i = 0; i < 12; ++i) {
        for (uint64_t at = 0; at < 8; ++at) write_to(disk, at << 20, bytes);
        disk.truncate(4096);
        disk.flush();
        disk.truncate(8 << 20);
        disk.flush();
        if (i == 0) first_size = file->size();
      }
      EXPECT_LE(file->size(), first_size + (64 << 10));
    }
    node->close();
    expect_consistent(file);
  });
}

TEST_F(Qcow2Resize, RefusalsChangeNothing) {
  on_fiber([&] {
    auto file = make_test_image({.size = 1 << 20, .cluster_bits = 9});
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
      const auto error_of = [&](uint64_t size) {
        try {
          disk.truncate(size);
        } catch (const base::Error& e) {
          return e.err();
        }
        return 0;
      };
      EXPECT_EQ(error_of(1000), EINVAL);
      // 32 MiB of L1 table describe 128 GiB with clusters of 512 bytes.
      EXPECT_EQ(error_of((uint64_t{128} << 30) + 512), EFBIG);
      EXPECT_EQ(disk.size(), uint64_t{1 << 20});
    }
    node->close();
    expect_consistent(file);
  });
}

// Every write or flush of a grow fails once: the disk stays as it was and can
// be grown afterwards.
TEST_F(Qcow2Resize, AnErrorAtEachStepLeavesASoundImage) {
  on_fiber([&] {
    const auto bytes = pattern_bytes(60000, 5);
    bool failed = true;
    for (uint64_t failing = 0; failed; ++failing) {
      SCOPED_TRACE(fmt::format("operation {}", failing));
      ASSERT_LT(failing, 200U);
      auto file = make_test_image({.size = 1 << 20, .cluster_bits = 9});
      auto node = open_test_image(file);
      {
        Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
        write_to(disk, 5000, bytes);
        uint64_t count = 0;
        file->before = [&](TestFile::Op op, uint64_t, uint64_t) {
          if (op == TestFile::Op::kRead) return;
          if (count++ == failing) throw base::Error(EIO, "injected");
        };
        failed = false;
        try {
          disk.truncate(16 << 20);
        } catch (const base::Error&) {
          failed = true;
        }
        file->before = nullptr;
        if (failed) {
          ASSERT_EQ(disk.size(), uint64_t{1 << 20});
          disk.truncate(16 << 20);
        }
        write_to(disk, (16 << 20) - 60000, bytes);
        std::vector<std::byte> got(bytes.size());
        disk.read(5000, base::SingleBuffer(got.data(), got.size()));
        ASSERT_EQ(got, bytes);
      }
      node->close();
      expect_consistent(file, true);
    }
  });
}

// Room is taken for what the disk has grown by, whatever lay there, and it still reads as zeroes;
// what is in the cluster in which it begins stays.
TEST_F(Qcow2Resize, PreallocationOfWhatIsNew) {
  for (const auto how : {Preallocation::kMetadata, Preallocation::kFalloc, Preallocation::kFull}) {
    for (const bool extended : {false, true}) {
      SCOPED_TRACE(fmt::format("mode {}, extended {}", static_cast<int>(how), extended));
      on_fiber([&] {
        constexpr uint64_t kOld = 5 * 16384 + 1024;
        auto below = std::make_shared<TestFile>();
        below->set_content(std::vector<std::byte>(400000, std::byte{0xbb}));
        auto file = make_test_image({.size = kOld,
                                     .cluster_bits = 14,
                                     .extended_l2 = extended,
                                     .backing_file = "below",
                                     .backing_format = "raw"});
        auto node = open_test_image(file, below);
        {
          Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
          disk.truncate(3 << 20);
          disk.preallocate(kOld, (3 << 20) - kOld, how);
          const auto content = read_all(disk);
          for (size_t i = 0; i < content.size(); ++i) {
            ASSERT_EQ(content[i], i < kOld ? std::byte{0xbb} : std::byte{0}) << i;
          }
          const BlockStatus status = disk.block_status(6 * 16384, (3 << 20) - 6 * 16384);
          EXPECT_TRUE(status.data);
          EXPECT_TRUE(status.allocated);
          // Nothing is left to be allocated.
          const uint64_t size = file->size();
          write_to(disk, 1 << 20, pattern_bytes(100000, 1));
          EXPECT_EQ(file->size(), size);
        }
        node->close();
        expect_consistent(file);
      });
    }
  }
}

class SizeLog final : public Node::ContentWatcher {
 public:
  explicit SizeLog(bool content) : content_(content) {}
  void content_changed(uint64_t, uint64_t) noexcept override { ++contents; }
  bool wants_content() const noexcept override { return content_; }
  void size_changed(uint64_t old_size, uint64_t new_size) noexcept override {
    sizes.emplace_back(old_size, new_size);
  }
  std::vector<std::pair<uint64_t, uint64_t>> sizes;
  unsigned contents = 0;

 private:
  const bool content_;
};

// Every front end hears of a new size, also one that has no use for changes of content and is
// therefore not told of them.
TEST_F(Qcow2Resize, FrontEndsAreTold) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,node-name=disk,size=2M"));
    Handle a = graph_.attach("disk", "a", Permissions::front_end(true));
    Handle b = graph_.attach("disk", "b", Permissions::front_end(true));
    const auto log_a = std::make_shared<SizeLog>(false);
    const auto log_b = std::make_shared<SizeLog>(false);
    a.watch(log_a);
    b.watch(log_b);
    a.truncate(2 << 20);  // as it is
    a.truncate(512);
    b.truncate(1 << 20);
    const std::vector<std::pair<uint64_t, uint64_t>> wanted{{2 << 20, 512}, {512, 1 << 20}};
    EXPECT_EQ(log_a->sizes, wanted);
    EXPECT_EQ(log_b->sizes, wanted);
    a.write(0, base::SingleBuffer(static_cast<const void*>("x"), 1));
    EXPECT_EQ(log_b->contents, 0U);
    b.watch(std::make_shared<SizeLog>(true));
    EXPECT_TRUE(graph_.find("disk")->watched());
    a.close();
    b.close();
  });
}

class Qcow2ResizeInterchange : public Qcow2Test {};

TEST_F(Qcow2ResizeInterchange, QemuReadsWhatWasResizedHereAndTheOtherWayRound) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is not installed";
  for (const char* more : {"cluster_size=64k", "cluster_size=512", "cluster_size=4k,compat=0.10",
                           "cluster_size=16k,extended_l2=on"}) {
    SCOPED_TRACE(more);
    const std::string image = path("disk.qcow2");
    ASSERT_EQ(run(fmt::format("qemu-img create -f qcow2 -o {} {} 3M", more, image)), 0);
    ASSERT_EQ(run(fmt::format("qemu-io -f qcow2 -c 'write -P 1 0 3M' {}", image)), 0);
    on_fiber([&] {
      Handle disk = open("disk.qcow2");
      disk.truncate(40 << 20);
      write_bytes(disk, 39 << 20, std::vector<std::byte>(70000, std::byte{2}));
      disk.truncate(2 << 20);
      disk.truncate(50 << 20);
      close(disk);
    });
    expect_clean("disk.qcow2");
    ASSERT_EQ(run(fmt::format("qemu-io -f qcow2 -c 'read -P 1 0 2M' -c 'read -P 0 2M 48M' {} | "
                              "grep -i 'verification failed'",
                              image)),
              1)
        << last_output_;
    ASSERT_EQ(run("qemu-img resize -f qcow2 --shrink " + image + " 1M"), 0) << last_output_;
    ASSERT_EQ(run("qemu-img resize -f qcow2 " + image + " 20M"), 0) << last_output_;
    on_fiber([&] {
      Handle disk = open("disk.qcow2");
      EXPECT_EQ(disk.size(), uint64_t{20 << 20});
      auto expected = std::vector<std::byte>(20 << 20);
      std::fill_n(expected.begin(), 1 << 20, std::byte{1});
      EXPECT_EQ(read_bytes(disk, 0, 20 << 20), expected);
      disk.truncate(1536 * 1024);
      close(disk);
    });
    expect_clean("disk.qcow2");
    std::filesystem::remove(image);
  }
}

}  // namespace
}  // namespace minivmm::block
