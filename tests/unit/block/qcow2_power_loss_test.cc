// SPDX-License-Identifier: Apache-2.0
// Power loss, by the product's own means: an overlay on a file below the log-writes filter, with
// requests delayed below so that they overtake each other. Several users write, zero, discard and
// flush the same ranges at once through handles of their own. Then states that a power loss could
// have left are made from the log: each has no corruption (leaks are allowed) and all that was
// flushed.
#include <sys/stat.h>

#include <fstream>
#include <map>

#include <fmt/core.h>

#include "base/io.h"
#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/repair.h"
#include "block/graph/handle.h"
#include "crash_states.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"
#include "write_log.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kBlock = 512;
constexpr uint64_t kMiB = 1 << 20;
constexpr unsigned kUsers = 6;
constexpr uint64_t kBaseValue = 1;

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  uint64_t disk;
  bool extended_l2 = false;
  bool lazy_refcounts = false;
};

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

void write_file(const std::string& path, const std::vector<std::byte>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

// Blocks that say what was written and where it belongs.
std::vector<std::byte> content(uint64_t value, uint64_t offset, uint64_t length) {
  std::vector<std::byte> out(length);
  for (uint64_t i = 0; i < length; i += 16) {
    const uint64_t words[2] = {value, offset + i / kBlock * kBlock};
    std::memcpy(out.data() + i, words, sizeof words);
  }
  return out;
}

class PowerLoss : public Qcow2Test, public testing::WithParamInterface<Case> {
 protected:
  // A change of a range. Times are of clock_; `mark` is how long the log was when it had ended.
  struct Change {
    uint64_t began = 0;
    uint64_t ended = 0;
    uint64_t mark = 0;
    uint64_t offset = 0;
    uint64_t length = 0;
    uint64_t value = 0;  // 0: zeroes
    bool fua = false;
    bool discard = false;
  };
  struct Flush {
    uint64_t began = 0;
    uint64_t mark = 0;
  };

  uint64_t disk_size() const { return GetParam().disk; }
  uint64_t base_size() const { return GetParam().disk * 5 / 8 + kBlock; }

  void make_images() {
    base_ = content(kBaseValue, 0, base_size());
    write_file(path("base"), base_);
    create("disk", {.size = disk_size(),
                    .version = GetParam().version,
                    .cluster_bits = GetParam().cluster_bits,
                    .refcount_order = GetParam().refcount_order,
                    .extended_l2 = GetParam().extended_l2,
                    .lazy_refcounts = GetParam().lazy_refcounts,
                    .backing_file = path("base"),
                    .backing_format = "raw"});
    start_ = read_file(path("disk"));
    std::ofstream(path("log")).close();
  }

  // qcow2 - log-writes - delays that depend on the place - the file.
  void open_disk() {
    const std::string log = "file.driver=log-writes,file.log.driver=file,file.log.filename=";
    const std::string flushes =
        "file.file.driver=fault,file.file.op=flush,file.file.errno=none,file.file.delay-ns=300000";
    const std::string near = fmt::format(
        "file.file.file.driver=fault,file.file.file.op=any,file.file.file.errno=none,"
        "file.file.file.length={},file.file.file.delay-ns=60000",
        disk_size() / 4);
    const std::string all =
        "file.file.file.file.driver=fault,file.file.file.file.op=write,"
        "file.file.file.file.errno=none,file.file.file.file.delay-ns=20000";
    const std::string file = "file.file.file.file.file.";
    graph_.add(Options::from_keys(fmt::format(
        "driver=qcow2,node-name=disk,l2-cache-size=8k,backing.driver=raw,backing.file.driver=file,"
        "backing.file.filename={},{}{},{},{},{},{}driver=file,{}filename={},{}cache.no-flush=on",
        path("base"), log, path("log"), flushes, near, all, file, file, path("disk"), file)));
  }

  uint64_t log_length() const {
    struct stat found {};
    return ::stat(path("log").c_str(), &found) == 0 ? static_cast<uint64_t>(found.st_size) : 0;
  }

  void ended(Change change) {
    change.mark = log_length();
    const std::lock_guard lock(mutex_);
    change.ended = ++clock_;
    changes_.push_back(change);
  }

  void step(Handle& disk, std::mt19937_64& random) {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    Change change;
    const uint64_t blocks = 1 + random() % std::min<uint64_t>(3 * cluster / kBlock, 160);
    change.length = blocks * kBlock;
    // A quarter of the disk is in high demand, so that users meet.
    const uint64_t range = random() % 2 == 0 ? disk_size() / 4 : disk_size();
    change.offset = random() % ((range - change.length) / kBlock + 1) * kBlock;
    change.began = ++clock_;
    const auto kind = random() % 14;
    if (kind < 8) {
      change.value = 2 + ++clock_;
      change.fua = kind == 0;
      const auto data = content(change.value, change.offset, change.length);
      disk.write(change.offset, base::SingleBuffer(std::span<const std::byte>(data)),
                 {.fua = change.fua});
      ended(change);
    } else if (kind < 10) {
      change.fua = random() % 8 == 0;
      disk.write_zeroes(change.offset, change.length, {.fua = change.fua, .may_unmap = kind == 8});
      ended(change);
    } else if (kind < 12) {
      change.discard = true;
      disk.discard(change.offset, change.length);
      ended(change);
    } else {
      disk.flush();
      const uint64_t mark = log_length();
      const std::lock_guard lock(mutex_);
      flushes_.push_back({change.began, mark});
    }
  }

  void work(uint64_t seed, unsigned steps) {
    open_disk();
    std::vector<Handle> handles;
    for (unsigned i = 0; i < kUsers; ++i) {
      handles.push_back(
          graph_.attach("disk", fmt::format("user {}", i), Permissions::front_end(true)));
    }
    base::WaitGroup running;
    for (unsigned i = 0; i < kUsers; ++i) {
      running.add();
      loops_.loop(i % 2).post("user", [&, i] {
        std::mt19937_64 random(seed + i);
        for (unsigned n = 0; n < steps; ++n) step(handles[i], random);
        running.done();
      });
    }
    running.wait();
    for (Handle& handle : handles) handle.close();
    graph_.remove("disk");
  }

  // The changes of each block, in the order of their beginnings.
  void index_changes() {
    std::sort(changes_.begin(), changes_.end(),
              [](const Change& a, const Change& b) { return a.began < b.began; });
    by_block_.assign(disk_size() / kBlock, {});
    for (const Change& change : changes_) {
      for (uint64_t at = change.offset; at < change.offset + change.length; at += kBlock) {
        by_block_[at / kBlock].push_back(&change);
      }
    }
  }

  // Whether a block may hold `value` where the log was `length` long at the cut.
  bool allowed(uint64_t block, uint64_t value, uint64_t length) const {
    uint64_t flushed = 0;
    for (const Flush& flush : flushes_) {
      if (flush.mark <= length) flushed = std::max(flushed, flush.began);
    }
    uint64_t floor = 0;  // something that is sure to be there began then
    for (const Change* change : by_block_[block]) {
      const bool durable = change->ended < flushed || (change->fua && change->mark <= length);
      if (durable && !change->discard) floor = std::max(floor, change->began);
    }
    const uint64_t initial = block * kBlock < base_size() ? kBaseValue : 0;
    if (value == initial && floor == 0) return true;
    return std::any_of(by_block_[block].begin(), by_block_[block].end(), [&](const Change* change) {
      // Discarding in a version 2 image may bring the base's content back.
      const bool brings_base = change->discard && GetParam().version == 2 && value == initial;
      return (change->value == value || brings_base) && change->ended >= floor;
    });
  }

  void expect_no_corruption(std::shared_ptr<TestFile> file, const char* when) {
    std::string lines;
    Edge edge(file, "check", {});
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    ASSERT_EQ(result.corruptions, 0U) << when << ": " << lines;
    ASSERT_EQ(result.check_errors, 0U) << when << ": " << lines;
  }

  // As opening it does: with lazy refcounts they may be anything now, and nothing else.
  void count_anew(std::shared_ptr<TestFile> file) {
    std::string lines;
    Edge edge(file, "repair", Permissions::format_file(true));
    const bool dirty = (qcow2::read_header(edge).incompatible & qcow2::kIncompatDirty) != 0;
    if (!dirty) return;
    const auto result = qcow2::repair_image(edge, qcow2::Repair::kAll,
                                            [&](const std::string& line) { lines += line + "\n"; });
    ASSERT_EQ(result.left.corruptions + result.left.check_errors, 0U) << lines;
    ASSERT_EQ(qcow2::read_header(edge).incompatible & qcow2::kIncompatDirty, 0U);
  }

  void expect_content(const std::vector<std::byte>& all, uint64_t length) {
    for (uint64_t i = 0; i < disk_size() / kBlock; ++i) {
      const std::byte* block = all.data() + i * kBlock;
      uint64_t value = 0;
      std::memcpy(&value, block, 8);
      const auto whole =
          value == 0 ? std::vector<std::byte>(kBlock) : content(value, i * kBlock, kBlock);
      ASSERT_EQ(std::memcmp(block, whole.data(), kBlock), 0)
          << "block " << i << " is torn or lies elsewhere";
      ASSERT_TRUE(allowed(i, value, length)) << "block " << i << " holds " << value;
    }
  }

  void expect_sound(std::vector<std::byte> bytes, uint64_t length, bool ask_qemu) {
    if (ask_qemu && !GetParam().lazy_refcounts) {
      write_file(path("state"), bytes);
      const int status = run("qemu-img check -f qcow2 " + path("state"));
      ASSERT_TRUE(status == 0 || status == 3) << last_output_;  // 3: leaks only
    }
    auto file = std::make_shared<TestFile>();
    file->set_content(std::move(bytes));
    if (GetParam().lazy_refcounts) {
      ASSERT_NO_FATAL_FAILURE(count_anew(file));
    }
    ASSERT_NO_FATAL_FAILURE(expect_no_corruption(file, "as found"));
    auto backing = std::make_shared<TestFile>();
    backing->set_content(base_);
    auto node = open_test_image(file, backing);
    std::vector<std::byte> all(disk_size());
    {
      Edge disk(node, "reader", Permissions::front_end(true));
      disk.read(0, base::SingleBuffer(all.data(), all.size()));
      ASSERT_NO_FATAL_FAILURE(expect_content(all, length));
      // Work goes on with it.
      const std::vector<std::byte> data(50'000, std::byte{7});
      disk.write(length % (disk_size() - data.size()),
                 base::SingleBuffer(std::span<const std::byte>(data)));
      disk.discard(0, disk_size() / 2);
    }
    node->close();
    node.reset();  // its edge lets go of the file
    ASSERT_NO_FATAL_FAILURE(expect_no_corruption(file, "after more writing"));
  }

  std::vector<std::byte> base_;
  std::vector<std::byte> start_;
  std::atomic<uint64_t> clock_{0};
  std::mutex mutex_;
  std::vector<Change> changes_;  // guarded by mutex_
  std::vector<Flush> flushes_;   // guarded by mutex_
  std::vector<std::vector<const Change*>> by_block_;
};

TEST_P(PowerLoss, LeavesWhatWasFlushedAndNoCorruption) {
  const char* given = std::getenv("MINIVMM_TEST_SEED");
  const uint64_t seed =
      given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  SCOPED_TRACE(fmt::format("MINIVMM_TEST_SEED={}", seed));
  const bool qemu = have_qemu();
  const unsigned states = crash_states(50);
  make_images();
  on_fiber([&] {
    work(seed, 60);
    index_changes();
    const WriteLog log(read_file(path("log")));
    const auto& entries = log.entries();
    ASSERT_GT(entries.size(), 200U);
    ASSERT_GT(flushes_.size(), 10U);
    std::mt19937_64 random(seed);
    for (unsigned i = 0; i < states && !HasFatalFailure(); ++i) {
      const size_t cut = i == 0 ? entries.size() : random() % (entries.size() + 1);
      const uint64_t length = cut == entries.size() ? ~uint64_t{0} : entries[cut].position;
      SCOPED_TRACE(fmt::format("state {}, cut before entry {} of {}", i, cut, entries.size()));
      expect_sound(log.after_power_loss(start_, cut, random), length, qemu && i % 10 == 0);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Overlays, PowerLoss,
                         testing::Values(Case{"v3_512", 3, 9, 4, kMiB},
                                         Case{"v3_2k_wide_refcounts", 3, 11, 6, 2 * kMiB},
                                         Case{"v3_4k_narrow_refcounts", 3, 12, 0, 4 * kMiB},
                                         Case{"v2_4k", 2, 12, 4, 2 * kMiB},
                                         Case{"v3_64k", 3, 16, 4, 8 * kMiB},
                                         Case{"v3_16k_extended", 3, 14, 4, 4 * kMiB, true},
                                         Case{"v3_4k_lazy", 3, 12, 4, 2 * kMiB, false, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace minivmm::block
