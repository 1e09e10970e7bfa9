// SPDX-License-Identifier: Apache-2.0
// Power cuts: concurrent writers work on an image whose file remembers every write and flush; then
// the file is cut off at random moments, with a random part of what had not been flushed. Each
// result opens, is free of corruption (leaks are allowed), and has everything that was flushed.
#include <fmt/core.h>

#include "base/io.h"
#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "crash_states.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kBlock = 512;

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  bool backing;
  bool extended_l2 = false;
};

class Qcow2Crash : public GraphTest, public testing::WithParamInterface<Case> {
 protected:
  // One thing that a block of the disk held. Value 0 is zeroes.
  struct Version {
    uint64_t value = 0;
    uint64_t began = 0;
    uint64_t ended = 0;
    bool fua = false;
  };
  struct GuestFlush {
    uint64_t began = 0;
    uint64_t ended = 0;
  };
  static constexpr uint64_t kDisk = 768 * 1024;
  static constexpr unsigned kFibers = 6;
  static constexpr uint64_t kBackingValue = 1;

  static std::vector<std::byte> block_of(uint64_t value) {
    std::vector<std::byte> out(kBlock);
    for (uint64_t i = 0; i < kBlock; i += 8) std::memcpy(out.data() + i, &value, 8);
    return out;
  }

  std::shared_ptr<Node> backing() {
    if (!GetParam().backing) return nullptr;
    auto out = std::make_shared<TestFile>();
    std::vector<std::byte> data;
    for (uint64_t i = 0; i < kDisk / 2; i += kBlock) {
      const auto block = block_of(kBackingValue);
      data.insert(data.end(), block.begin(), block.end());
    }
    out->set_content(std::move(data));
    return out;
  }

  void remember(uint64_t offset, uint64_t length, uint64_t value, uint64_t began,
                bool fua = false) {
    const std::lock_guard lock(mutex_);
    const uint64_t ended = file_->tick();
    for (uint64_t at = offset; at < offset + length; at += kBlock) {
      history_[at / kBlock].push_back({value, began, ended, fua});
    }
  }

  void step(Edge& disk, std::mt19937_64& random, uint64_t begin, uint64_t end) {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    uint64_t offset = begin + random() % ((end - begin) / kBlock) * kBlock;
    uint64_t length = (1 + random() % (4 * cluster / kBlock)) * kBlock;
    length = std::min(length, end - offset);
    const uint64_t began = file_->tick();
    const auto kind = random() % 12;
    if (kind < 6) {
      const uint64_t value = next_value_.fetch_add(1);
      std::vector<std::byte> data;
      for (uint64_t i = 0; i < length; i += kBlock) {
        const auto block = block_of(value);
        data.insert(data.end(), block.begin(), block.end());
      }
      const bool fua = random() % 8 == 0;
      disk.write(offset, base::SingleBuffer(std::span<const std::byte>(data)), {.fua = fua});
      remember(offset, length, value, began, fua);
    } else if (kind < 8) {
      disk.write_zeroes(offset, length, {.may_unmap = kind == 6});
      remember(offset, length, 0, began);
    } else if (kind < 10) {
      const bool whole = GetParam().version >= 3 || !GetParam().backing;
      const uint64_t first = (offset + cluster - 1) / cluster * cluster;
      const uint64_t last = (offset + length) / cluster * cluster;
      disk.discard(offset, length);
      if (whole && first < last) remember(first, last - first, 0, began);
    } else if (kind == 10) {
      const uint64_t flush_began = file_->tick();
      disk.flush();
      const std::lock_guard lock(mutex_);
      flushes_.push_back({flush_began, file_->tick()});
    } else {
      base::EventLoop::current()->yield();
    }
  }

  void work(uint64_t seed) {
    file_ = make_test_image({.size = kDisk,
                             .version = GetParam().version,
                             .cluster_bits = GetParam().cluster_bits,
                             .refcount_order = GetParam().refcount_order,
                             .extended_l2 = GetParam().extended_l2});
    file_->start_log();
    // Requests overtake each other.
    file_->before = [](TestFile::Op, uint64_t offset, uint64_t length) {
      for (uint64_t i = (offset / 512 + length / 512) % 3; i > 0; --i) {
        base::EventLoop::current()->yield();
      }
    };
    file_->after = file_->before;
    history_.assign(kDisk / kBlock, {});
    auto node = open_test_image(file_, backing(), false, 8192);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      base::WaitGroup running;
      for (unsigned i = 0; i < kFibers; ++i) {
        running.add();
        loops_.loop(i % 2).post("writer", [&, i] {
          std::mt19937_64 random(seed + i);
          const uint64_t stripe = kDisk / kFibers / kBlock * kBlock;
          for (int n = 0; n < 70; ++n) step(disk, random, i * stripe, (i + 1) * stripe);
          running.done();
        });
      }
      running.wait();
    }
    node->close();
  }

  // What block `index` may hold after a cut: what was durable, or anything begun later.
  bool allowed(uint64_t index, uint64_t value, uint64_t cut) const {
    const uint64_t initial = GetParam().backing && index * kBlock < kDisk / 2 ? kBackingValue : 0;
    const auto& versions = history_[index];
    size_t durable = 0;  // versions before this one were overwritten durably
    bool initial_possible = true;
    for (size_t i = 0; i < versions.size(); ++i) {
      if (versions[i].fua && versions[i].ended <= cut) {
        durable = i;
        initial_possible = false;
      }
      for (const GuestFlush& flush : flushes_) {
        if (versions[i].ended < flush.began && flush.ended <= cut) {
          durable = i;
          initial_possible = false;
          break;
        }
      }
    }
    if (initial_possible && value == initial) return true;
    for (size_t i = durable; i < versions.size(); ++i) {
      if (versions[i].began <= cut && versions[i].value == value) return true;
    }
    return false;
  }

  void expect_sound(std::vector<std::byte> image, uint64_t cut) {
    auto file = std::make_shared<TestFile>();
    file->set_content(std::move(image));
    std::string lines;
    {
      Edge edge(file, "check", {});
      const auto result =
          qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
      ASSERT_EQ(result.corruptions, 0U) << lines;
      ASSERT_EQ(result.check_errors, 0U) << lines;
    }
    auto node = open_test_image(file, backing());
    std::vector<std::byte> all(kDisk);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      disk.read(0, base::SingleBuffer(all.data(), all.size()));
      // It can be worked on: what leaked is in nobody's way.
      std::vector<std::byte> data(20000, std::byte{7});
      disk.write(cut % (kDisk - 20000), base::SingleBuffer(std::span<const std::byte>(data)));
    }
    node->close();
    node.reset();
    for (uint64_t i = 0; i < kDisk / kBlock; ++i) {
      uint64_t value;
      std::memcpy(&value, all.data() + i * kBlock, 8);
      const auto whole = block_of(value);
      ASSERT_EQ(std::memcmp(all.data() + i * kBlock, whole.data(), kBlock), 0)
          << "block " << i << " is a mixture";
      ASSERT_TRUE(allowed(i, value, cut)) << "block " << i << " holds " << value;
    }
    Edge edge(file, "check", {});
    const auto result = qcow2::check_image(edge, [&](const std::string& line) { lines += line; });
    ASSERT_EQ(result.corruptions, 0U) << "after more writing: " << lines;
  }

  std::shared_ptr<TestFile> file_;
  std::mutex mutex_;
  std::vector<std::vector<Version>> history_;  // guarded by mutex_
  std::vector<GuestFlush> flushes_;            // guarded by mutex_
  std::atomic<uint64_t> next_value_{100};
};

TEST_P(Qcow2Crash, WhatWasFlushedSurvivesAndTheImageIsConsistent) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned states = crash_states(150);
  on_fiber([&] {
    work(seed);
    std::mt19937_64 random(seed);
    const uint64_t end = file_->now();
    for (unsigned i = 0; i < states && !HasFatalFailure(); ++i) {
      const uint64_t cut = i == 0 ? end : random() % (end + 1);
      SCOPED_TRACE(fmt::format("cut {} of {}", cut, end));
      expect_sound(file_->after_power_cut(cut, random), cut);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Formats, Qcow2Crash,
                         testing::Values(Case{"v3_4k_backing", 3, 12, 4, true},
                                         Case{"v3_512_wide_refcounts", 3, 9, 6, false},
                                         Case{"v3_512_backing", 3, 9, 4, true},
                                         Case{"v2_1k", 2, 10, 4, false},
                                         Case{"v3_4k_narrow_refcounts", 3, 12, 0, true},
                                         Case{"v3_64k", 3, 16, 4, false},
                                         Case{"v3_16k_extended_backing", 3, 14, 4, true, true},
                                         Case{"v3_64k_extended", 3, 16, 4, false, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace minivmm::block
