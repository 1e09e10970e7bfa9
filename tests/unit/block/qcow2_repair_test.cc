// SPDX-License-Identifier: Apache-2.0
// Repair: images that are sound are damaged byte by byte, repaired, and must then be clean to us
// and to qemu-img, with every byte of the guest's that the damage did not destroy. The same from
// every state that a power cut during the repair can leave.
#include <functional>

#include "base/bytes.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/mend_entry.h"
#include "block/formats/qcow2/refcount_codec.h"
#include "block/formats/qcow2/repair.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
using qcow2::kFlagCompressed;
using qcow2::kFlagCopied;
using qcow2::kOffsetMask;
using qcow2::Repair;
using qcow2::RepairResult;

constexpr uint64_t kDisk = 8 << 20;

// An image in memory whose tables a test edits.
class Victim {
 public:
  explicit Victim(Bytes bytes) : bytes_(std::move(bytes)) {
    header_ = qcow2::parse_header(std::span(bytes_).first(std::min<size_t>(bytes_.size(), 1 << 16)),
                                  bytes_.size());
    geometry_ = header_.geometry();
  }
  const qcow2::Header& header() const { return header_; }
  const qcow2::Geometry& geometry() const { return geometry_; }
  const Bytes& bytes() const { return bytes_; }
  Bytes& bytes() { return bytes_; }
  uint64_t cluster() const { return geometry_.cluster_size(); }

  uint64_t get(uint64_t at) const { return base::load_be<uint64_t>(bytes_.data() + at); }
  void set(uint64_t at, uint64_t value) { base::store_be(bytes_.data() + at, value); }
  uint64_t l1_at(uint64_t index) const { return header_.l1_offset + index * 8; }
  uint64_t l2_table(uint64_t l1_index = 0) const { return get(l1_at(l1_index)) & kOffsetMask; }
  uint64_t l2_at(uint64_t guest_cluster) const {
    const uint64_t index = guest_cluster % geometry_.l2_entries();
    return l2_table(guest_cluster / geometry_.l2_entries()) + index * geometry_.l2_entry_bytes();
  }
  uint64_t block(uint64_t index = 0) const {
    return get(header_.refcount_table_offset + index * 8);
  }
  void set_refcount(uint64_t host_cluster, uint64_t value) {
    const uint64_t entries = geometry_.block_entries();
    qcow2::set_refcount(bytes_.data() + block(host_cluster / entries), host_cluster % entries,
                        geometry_.refcount_order, std::min(value, geometry_.refcount_max()));
  }
  uint64_t host_cluster(uint64_t guest_cluster) const {
    return (get(l2_at(guest_cluster)) & kOffsetMask) >> geometry_.cluster_bits;
  }

 private:
  Bytes bytes_;
  qcow2::Header header_;
  qcow2::Geometry geometry_;
};

struct Damage {
  const char* name;
  std::function<void(Victim&)> apply;
  // Guest clusters that are lost and read as zeroes (of version 2 as well: there is no backing).
  uint64_t lost_first = 0;
  uint64_t lost_count = 0;
  unsigned min_version = 2;
};

uint64_t far_away(const Victim& v) { return (uint64_t{1} << 40) & ~(v.cluster() - 1); }

std::vector<Damage> all_damages() {
  return {
      {"RefcountZero", [](Victim& v) { v.set_refcount(v.host_cluster(1), 0); }},
      {"RefcountOfTableZero",
       [](Victim& v) { v.set_refcount(v.l2_table() >> v.geometry().cluster_bits, 0); }},
      {"RefcountOfHeaderZero", [](Victim& v) { v.set_refcount(0, 0); }},
      {"Leaks",
       [](Victim& v) {
         for (uint64_t i = 0; i < 5; ++i) {
           v.set_refcount((v.bytes().size() >> v.geometry().cluster_bits), 1);
           v.bytes().resize(v.bytes().size() + v.cluster());
         }
       }},
      {"CopiedMissing",
       [](Victim& v) {
         v.set(v.l2_at(2), v.get(v.l2_at(2)) & ~kFlagCopied);
         v.set(v.l1_at(0), v.get(v.l1_at(0)) & ~kFlagCopied);
       }},
      {"ReservedBitsOfL2",
       [](Victim& v) { v.set(v.l2_at(1), v.get(v.l2_at(1)) | uint64_t{1} << 57); }},
      {"ReservedBitsOfL1",
       [](Victim& v) { v.set(v.l1_at(0), v.get(v.l1_at(0)) | uint64_t{1} << 60 | 4); }},
      {"L2OutsideTheFile", [](Victim& v) { v.set(v.l2_at(1), far_away(v) | kFlagCopied); }, 1, 1},
      {"L2Misaligned", [](Victim& v) { v.set(v.l2_at(3), v.get(v.l2_at(3)) + 512); }, 3, 1},
      {"L2AtTheHeader", [](Victim& v) { v.set(v.l2_at(1), kFlagCopied); }, 1, 1, 2},
      {"L2AtTheL1Table", [](Victim& v) { v.set(v.l2_at(1), v.header().l1_offset | kFlagCopied); },
       1, 1},
      {"L2AtItsOwnTable", [](Victim& v) { v.set(v.l2_at(1), v.l2_table() | kFlagCopied); }, 1, 1},
      {"CompressedNowhere",
       [](Victim& v) {
         v.set(v.l2_at(2), kFlagCompressed | kFlagCopied | far_away(v));
         if (v.geometry().extended_l2) v.set(v.l2_at(2) + 8, 0);
       },
       2, 1},
      {"RefcountTableEmpty", [](Victim& v) { v.set(v.header().refcount_table_offset, 0); }},
      {"RefcountTableWild",
       [](Victim& v) { v.set(v.header().refcount_table_offset, far_away(v) + 512); }},
      {"RefcountBlockIsTheL1Table",
       [](Victim& v) { v.set(v.header().refcount_table_offset, v.header().l1_offset); }},
      {"RefcountBlockOfGarbage",
       [](Victim& v) {
         const Bytes garbage = pattern_bytes(v.cluster(), 7);
         std::copy(garbage.begin(), garbage.end(),
                   v.bytes().begin() + static_cast<ptrdiff_t>(v.block()));
       }},
      {"RefcountBlockOfZeroes",
       [](Victim& v) {
         std::fill_n(v.bytes().begin() + static_cast<ptrdiff_t>(v.block()), v.cluster(),
                     std::byte{0});
       }},
      {"MarkedDirtyAndCorrupt",
       [](Victim& v) { v.set(qcow2::kIncompatibleField, v.get(qcow2::kIncompatibleField) | 3); }, 0,
       0, 3},
  };
}

struct Kind {
  const char* name;
  qcow2::CreateOptions options;
};

std::vector<Kind> all_kinds() {
  return {
      {"V2", {.size = kDisk, .version = 2, .cluster_bits = 12}},
      {"V3", {.size = kDisk, .cluster_bits = 12}},
      {"SmallClusters", {.size = kDisk, .cluster_bits = 10, .refcount_order = 5}},
      {"OneBit", {.size = kDisk, .cluster_bits = 12, .refcount_order = 0}},
      {"Wide", {.size = kDisk, .cluster_bits = 16, .refcount_order = 6}},
      {"Subclusters", {.size = kDisk, .cluster_bits = 14, .extended_l2 = true}},
  };
}

class Qcow2Repair : public Qcow2Test {
 protected:
  // Three quarters of the disk's first clusters, zeroes among them.
  Bytes make_sound(const qcow2::CreateOptions& options) {
    return on_fiber([&] {
      auto file = make_test_image(options);
      auto node = open_test_image(file);
      Edge disk(node, "guest", Permissions::front_end(true));
      const uint64_t cluster = options.cluster_size();
      for (const uint64_t at : {uint64_t{0}, uint64_t{5}, kDisk / cluster / 2}) {
        const Bytes data = pattern_bytes(4 * cluster, at + 1);
        disk.write(at * cluster, base::SingleBuffer(std::span<const std::byte>(data)));
      }
      if (options.version >= 3) disk.write_zeroes(20 * cluster, 2 * cluster, {});
      disk.flush();
      node->close();
      return file->content();
    });
  }
  // Fiber.
  Bytes guest_content(const Bytes& image) {
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file, nullptr, true);
    Bytes out(node->size());
    {
      Edge disk(node, "reader", Permissions::front_end(false));
      disk.read(0, base::SingleBuffer(out.data(), out.size()));
    }
    node->close();
    return out;
  }
  RepairResult repair(const std::shared_ptr<TestFile>& file, Repair what) {
    lines_.clear();
    Edge edge(file, "repair", Permissions::format_file(true));
    return qcow2::repair_image(edge, what, [&](const std::string& line) { lines_ += line + "\n"; });
  }
  void save(const std::string& name, const Bytes& bytes) {
    // SAFETY: bytes as characters.
    std::ofstream(path(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
  }
  static void expect_none_left(const RepairResult& result, const std::string& lines) {
    EXPECT_EQ(result.left.corruptions, 0U) << lines;
    EXPECT_EQ(result.left.leaks, 0U) << lines;
    EXPECT_EQ(result.left.check_errors, 0U) << lines;
  }
  static Bytes expected(const Bytes& before, const Damage& damage, uint64_t cluster) {
    Bytes out = before;
    std::fill_n(out.begin() + static_cast<ptrdiff_t>(damage.lost_first * cluster),
                damage.lost_count * cluster, std::byte{0});
    return out;
  }

  std::string lines_;
};

TEST_F(Qcow2Repair, EveryKindOfDamageIsMended) {
  const bool qemu = have_qemu();
  for (const Kind& kind : all_kinds()) {
    const Bytes sound = make_sound(kind.options);
    const Bytes content = on_fiber([&] { return guest_content(sound); });
    for (const Damage& damage : all_damages()) {
      if (kind.options.version < damage.min_version) continue;
      SCOPED_TRACE(fmt::format("{} {}", kind.name, damage.name));
      Victim victim(sound);
      damage.apply(victim);
      ASSERT_NE(victim.bytes(), sound);
      Bytes repaired;
      on_fiber([&] {
        auto file = std::make_shared<TestFile>();
        file->set_content(victim.bytes());
        const RepairResult result = repair(file, Repair::kAll);
        expect_none_left(result, lines_);
        repaired = file->content();
        EXPECT_EQ(base::load_be<uint64_t>(repaired.data() + qcow2::kIncompatibleField) & 3, 0U);
        EXPECT_TRUE(guest_content(repaired) ==
                    expected(content, damage, kind.options.cluster_size()));
        // Nothing is found to be done a second time.
        EXPECT_EQ(repair(file, Repair::kAll).corruptions_fixed, 0U) << lines_;
        EXPECT_TRUE(file->content() == repaired);
      });
      if (!qemu) continue;
      save("repaired", repaired);
      expect_clean("repaired");
    }
  }
}

// The image is at no time worse than it was: what a power cut leaves is repaired to the same.
TEST_F(Qcow2Repair, APowerCutDuringARepairLosesNothing) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  for (const Kind& kind : all_kinds()) {
    const Bytes sound = make_sound(kind.options);
    const Bytes content = on_fiber([&] { return guest_content(sound); });
    for (const Damage& damage : all_damages()) {
      if (kind.options.version < damage.min_version) continue;
      SCOPED_TRACE(fmt::format("{} {}", kind.name, damage.name));
      Victim victim(sound);
      damage.apply(victim);
      on_fiber([&] {
        auto file = std::make_shared<TestFile>();
        file->set_content(victim.bytes());
        file->start_log();
        repair(file, Repair::kAll);
        const Bytes right = expected(content, damage, kind.options.cluster_size());
        for (int i = 0; i < 6; ++i) {
          auto cut = std::make_shared<TestFile>();
          cut->set_content(file->after_power_cut(random() % (file->now() + 2), random));
          expect_none_left(repair(cut, Repair::kAll), lines_);
          EXPECT_TRUE(guest_content(cut->content()) == right);
        }
      });
    }
  }
}

// qemu-img's own images, with what this driver does not write: compressed clusters, snapshots.
TEST_F(Qcow2Repair, ImagesOfQemuWithSnapshotsAndCompressedClusters) {
  if (!have_qemu()) GTEST_SKIP() << "no qemu-img";
  Bytes raw(1 << 20);
  for (size_t i = 0; i < raw.size(); ++i) raw[i] = static_cast<std::byte>(i / 700);
  save("raw", raw);
  for (const char* options : {"cluster_size=4k", "cluster_size=16k,extended_l2=on"}) {
    ASSERT_EQ(run(fmt::format("qemu-img convert -c -O qcow2 -o {} {} {}", options, path("raw"),
                              path("image"))),
              0)
        << last_output_;
    ASSERT_EQ(run("qemu-io -c 'write -P 3 0 100k' -c 'write -z 200k 64k' " + path("image")), 0);
    ASSERT_EQ(run("qemu-img snapshot -c one " + path("image")), 0);
    ASSERT_EQ(run("qemu-io -c 'write -P 4 4k 50k' -c 'write -P 5 512k 64k' " + path("image")), 0);
    ASSERT_EQ(run("qemu-img snapshot -c two " + path("image")), 0);
    ASSERT_EQ(run("qemu-io -c 'write -P 6 0 20k' " + path("image")), 0);
    std::ifstream in(path("image"), std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const auto span = std::as_bytes(std::span(text));
    const Bytes sound(span.begin(), span.end());
    const Bytes content = on_fiber([&] { return guest_content(sound); });
    const std::vector<Damage> damages = {
        {"CopiedOfShared",
         [](Victim& v) {
           const uint64_t at = v.l2_at(512 * 1024 / v.cluster());
           v.set(at, v.get(at) | kFlagCopied);
         }},
        {"RefcountOfShared",
         [](Victim& v) { v.set_refcount(v.host_cluster(512 * 1024 / v.cluster()), 1); }},
        {"RefcountTooHigh",
         [](Victim& v) { v.set_refcount(v.host_cluster(512 * 1024 / v.cluster()), 9); }},
        {"TableEmpty", [](Victim& v) { v.set(v.header().refcount_table_offset, 0); }},
        {"CopiedOfCompressed",
         [](Victim& v) {
           const uint64_t at = v.l2_at(v.geometry().clusters(900 * 1024));
           ASSERT_NE(v.get(at) & kFlagCompressed, 0U);
           v.set(at, v.get(at) | kFlagCopied);
         }},
    };
    for (const Damage& damage : damages) {
      SCOPED_TRACE(fmt::format("{} {}", options, damage.name));
      Victim victim(sound);
      damage.apply(victim);
      const Bytes repaired = on_fiber([&] {
        auto file = std::make_shared<TestFile>();
        file->set_content(victim.bytes());
        expect_none_left(repair(file, Repair::kAll), lines_);
        EXPECT_TRUE(guest_content(file->content()) == content);
        return file->content();
      });
      save("repaired", repaired);
      expect_clean("repaired");
      // The snapshots are still there and read as before.
      save("sound", sound);
      for (const char* name : {"one", "two"}) {
        for (const char* image : {"sound", "repaired"}) {
          ASSERT_EQ(run(fmt::format("qemu-img convert -l {} -O raw {} {}", name, path(image),
                                    path(fmt::format("{}.{}", image, name)))),
                    0)
              << last_output_;
        }
        EXPECT_EQ(run(fmt::format("cmp {0}.{2} {1}.{2}", path("sound"), path("repaired"), name)), 0)
            << last_output_;
      }
    }
  }
}

// Leaks alone: nothing else is touched.
TEST_F(Qcow2Repair, OnlyLeaksAreLoweredWhenThatIsAskedFor) {
  Bytes sound = make_sound({.size = kDisk, .cluster_bits = 12});
  const uint64_t leaked = sound.size() / 4096;
  sound.resize(sound.size() + 4096);
  Victim victim(sound);
  victim.set_refcount(leaked, 5);
  // Behind the end of the file: no leak, and lowered all the same.
  victim.set_refcount(leaked + 100, 3);
  victim.set_refcount(victim.host_cluster(2), 0);
  Victim right(sound);
  right.set_refcount(right.host_cluster(2), 0);
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    file->set_content(victim.bytes());
    const RepairResult result = repair(file, Repair::kLeaks);
    EXPECT_EQ(result.leaks_fixed, 1U);
    EXPECT_EQ(result.corruptions_fixed, 0U);
    EXPECT_EQ(result.left.leaks, 0U) << lines_;
    EXPECT_EQ(result.left.corruptions, 2U) << lines_;  // its refcount, its flag
    EXPECT_TRUE(file->content() == right.bytes());
  });
}

// An entry that makes no sense may be the only trace of clusters that are in use.
TEST_F(Qcow2Repair, LeaksAreKeptWhileReferencesAreLost) {
  const Bytes sound = make_sound({.size = kDisk, .cluster_bits = 12});
  Victim victim(sound);
  victim.set(victim.l1_at(0), victim.get(victim.l1_at(0)) | uint64_t{1} << 60);
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    file->set_content(victim.bytes());
    const RepairResult result = repair(file, Repair::kLeaks);
    EXPECT_GT(result.left.leaks, 0U);
    EXPECT_EQ(result.leaks_fixed, 0U);
    EXPECT_TRUE(file->content() == victim.bytes());
  });
}

// What vouches for parts that a repair does not maintain is withdrawn before the first change;
// bitmaps are not among it.
TEST_F(Qcow2Repair, UnknownAutoclearBitsAreCleared) {
  Bytes sound = make_sound({.size = kDisk, .cluster_bits = 12});
  const uint64_t leaked = sound.size() / 4096;
  sound.resize(sound.size() + 4096);
  for (const Repair what : {Repair::kLeaks, Repair::kAll}) {
    Victim victim(sound);
    victim.set_refcount(leaked, 5);
    victim.set(qcow2::kAutoclearField, uint64_t{1} << 40);
    on_fiber([&] {
      auto file = std::make_shared<TestFile>();
      file->set_content(victim.bytes());
      EXPECT_EQ(repair(file, what).leaks_fixed, 1U);
      EXPECT_EQ(base::load_be<uint64_t>(file->content().data() + qcow2::kAutoclearField), 0U);
    });
  }
}

// A sound image is not written to, and not even marked meanwhile.
TEST_F(Qcow2Repair, ASoundImageStaysAsItIs) {
  for (const Kind& kind : all_kinds()) {
    SCOPED_TRACE(kind.name);
    const Bytes sound = make_sound(kind.options);
    on_fiber([&] {
      auto file = std::make_shared<TestFile>();
      file->set_content(sound);
      file->before = [](TestFile::Op op, uint64_t, uint64_t) {
        EXPECT_NE(op, TestFile::Op::kWrite);
      };
      const RepairResult result = repair(file, Repair::kAll);
      expect_none_left(result, lines_);
      EXPECT_EQ(result.leaks_fixed + result.corruptions_fixed, 0U);
    });
  }
}

// Whatever fails while writing: the image can be repaired afterwards.
TEST_F(Qcow2Repair, AnErrorWhileRepairingIsReportedAndLeavesItRepairable) {
  const Bytes sound = make_sound({.size = kDisk, .cluster_bits = 12});
  const Bytes content = on_fiber([&] { return guest_content(sound); });
  Victim victim(sound);
  victim.set(victim.header().refcount_table_offset, 0);
  on_fiber([&] {
    for (int fail_at = 0; fail_at < 6; ++fail_at) {
      auto file = std::make_shared<TestFile>();
      file->set_content(victim.bytes());
      int writes = 0;
      file->before = [&](TestFile::Op op, uint64_t, uint64_t) {
        if (op == TestFile::Op::kWrite && writes++ == fail_at) throw base::Error(EIO, "injected");
      };
      const int error = error_number([&] { repair(file, Repair::kAll); });
      file->before = nullptr;
      EXPECT_EQ(error, writes > fail_at ? EIO : 0);
      expect_none_left(repair(file, Repair::kAll), lines_);
      EXPECT_TRUE(guest_content(file->content()) == content);
    }
  });
}

// Whatever the tables said, afterwards they are sound; only what they now call compressed data may
// be none.
TEST_F(Qcow2Repair, RandomDamageEndsInACleanImageOrAnError) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  for (const Kind& kind : all_kinds()) {
    const Bytes sound = make_sound(kind.options);
    for (int round = 0; round < 60; ++round) {
      Victim victim(sound);
      const uint64_t places[] = {victim.l1_at(0), victim.l2_table(), victim.block(),
                                 victim.header().refcount_table_offset};
      for (uint64_t i = 0; i <= random() % 12; ++i) {
        const uint64_t at = places[random() % 4] + random() % 40 * 8;
        const uint64_t host = random() % (victim.bytes().size() / victim.cluster() + 2);
        const uint64_t values[] = {random(), host * victim.cluster(),
                                   host * victim.cluster() | kFlagCopied,
                                   victim.get(at) ^ uint64_t{1} << random() % 64};
        victim.set(at, values[random() % 4]);
      }
      on_fiber([&] {
        auto file = std::make_shared<TestFile>();
        file->set_content(victim.bytes());
        const RepairResult result = repair(file, Repair::kAll);
        // A width of one bit cannot count a cluster that two entries share.
        if (kind.options.refcount_order != 0) expect_none_left(result, lines_);
        const std::string error = error_text([&] { guest_content(file->content()); });
        EXPECT_TRUE(error.empty() || error.find("the compressed cluster") != std::string::npos)
            << error;
      });
      if (HasFailure()) FAIL() << kind.name << " round " << round;
    }
  }
}

TEST(Qcow2MendEntry, KeepsWhatMakesSense) {
  const qcow2::Geometry v3{.cluster_bits = 16};
  const qcow2::Geometry v2{.cluster_bits = 16, .version = 2};
  const qcow2::Geometry wide{.cluster_bits = 16, .extended_l2 = true};
  const qcow2::Geometry external{.cluster_bits = 16, .external_data = true};
  const auto entry = [](qcow2::RawL2 raw, const qcow2::Geometry& g) {
    return qcow2::mend_l2(raw, g, 0x30000);
  };
  EXPECT_EQ(entry({0x50000 | kFlagCopied, 0}, v3), (qcow2::RawL2{0x50000 | kFlagCopied, 0}));
  EXPECT_EQ(entry({0x50000 | uint64_t{1} << 60, 0}, v3), (qcow2::RawL2{0x50000, 0}));
  EXPECT_EQ(entry({0x50200, 0}, v3), (qcow2::RawL2{1, 0}));
  EXPECT_EQ(entry({0x50200, 0}, v2), (qcow2::RawL2{0, 0}));
  EXPECT_EQ(entry({0x50001, 0}, v2), (qcow2::RawL2{0x50000, 0}));
  EXPECT_EQ(entry({kFlagCopied, 0}, v3), (qcow2::RawL2{0, 0}));
  // Data wins over zeroes; data without a place is lost; zeroes stay.
  EXPECT_EQ(entry({0x50000, 3ULL << 32 | 1}, wide), (qcow2::RawL2{0x50000, 2ULL << 32 | 1}));
  EXPECT_EQ(entry({0, 2ULL << 32 | 1}, wide), (qcow2::RawL2{0, 3ULL << 32}));
  EXPECT_EQ(entry({0x50001, 1}, wide), (qcow2::RawL2{0x50000, 1}));
  EXPECT_EQ(entry({kFlagCompressed | 0x50000, 7}, wide),
            (qcow2::RawL2{kFlagCompressed | 0x50000, 0}));
  EXPECT_EQ(entry({0x50000 | kFlagCopied, 0}, external), (qcow2::RawL2{0x30000 | kFlagCopied, 0}));
  EXPECT_EQ(entry({kFlagCompressed | 0x50000, 0}, external), (qcow2::RawL2{1, 0}));
}

}  // namespace
}  // namespace minivmm::block
