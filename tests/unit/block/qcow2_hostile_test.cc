// SPDX-License-Identifier: Apache-2.0
// Images whose tables lie. Each is an error or harmless, in bounded time, and a check says what is
// wrong.
#include "qcow2_hostile.h"

#include <chrono>

#include <fmt/core.h>

#include "base/checked.h"

namespace minivmm::block {
namespace {

TEST_F(Qcow2Hostile, BadL1EntriesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t flag = qcow2::kFlagCopied;
    for (const uint64_t entry :
         {uint64_t{0x200}, uint64_t{1}, flag, flag | 0x1200, flag | 1, flag | uint64_t{1} << 58,
          flag | uint64_t{1} << 50, flag | 0x00ff'ffff'ffff'f000}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, l1_offset(image), entry);
      expect_refused(image);
    }
  });
}

TEST_F(Qcow2Hostile, BadL2EntriesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t flag = qcow2::kFlagCopied;
    for (const uint64_t entry :
         {flag, flag | 0x200, flag | 0x7002, flag | uint64_t{1} << 57, flag | uint64_t{1} << 50,
          flag | base::align_up<uint64_t>(good.size(), kCluster),
          flag | qcow2::kFlagCompressed | 0x5000, qcow2::kFlagCompressed,
          qcow2::kFlagCompressed | uint64_t{1} << 40}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, l2_offset(image), entry);
      expect_refused(image);
    }
  });
}

// Both give it up: it must not be free twice, or while the other still has it.
TEST_F(Qcow2Hostile, AClusterThatTwoEntriesHaveIsNotFreedTwice) {
  on_fiber([&] {
    Bytes image = good_image();
    put(image, l2_offset(image) + 8, get(image, l2_offset(image)));
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      disk.discard(0, 2 * kCluster);
      (void)error_number([&] { disk.flush(); });
    }
    (void)error_number([&] { node->close(); });
    EXPECT_EQ(get(file->content(), 72), qcow2::kIncompatCorrupt);
  });
}

// What the refcounts say is no longer believed: nothing is freed by them.
TEST_F(Qcow2Hostile, NothingIsFreedAfterCorruptionWasFound) {
  on_fiber([&] {
    Bytes image = good_image();
    const uint64_t table = l2_offset(image);
    const uint64_t data = get(image, table) & qcow2::kOffsetMask;
    put(image, table + 8, qcow2::kFlagCopied | 0x200);  // misaligned
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      disk.discard(0, kCluster);
      Bytes to(kCluster);
      const base::SingleBuffer buffer(to.data(), to.size());
      EXPECT_EQ(error_number([&] { disk.read(kCluster, buffer); }), EIO);
    }
    node->close();
    const Bytes after = file->content();
    EXPECT_TRUE(std::equal(after.begin() + static_cast<long>(data),
                           after.begin() + static_cast<long>(data + kCluster),
                           image.begin() + static_cast<long>(data)))
        << "a hole was punched";
    const uint64_t refcounts = get(image, get(image, 48));
    EXPECT_TRUE(std::equal(after.begin() + static_cast<long>(refcounts),
                           after.begin() + static_cast<long>(refcounts + kCluster),
                           image.begin() + static_cast<long>(refcounts)))
        << "a refcount was lowered";
  });
}

TEST_F(Qcow2Hostile, BadRefcountTablesAreRefused) {
  on_fiber([&] {
    const Bytes good = good_image();
    const uint64_t table = get(good, 48);
    for (const uint64_t entry :
         {uint64_t{0x1200}, uint64_t{0x1001}, uint64_t{1} << 60, uint64_t{0x1000}, get(good, 40)}) {
      SCOPED_TRACE(entry);
      Bytes image = good;
      put(image, table, entry);
      EXPECT_GT(corruptions(image), 0U);
      const Outcome out = use(image);
      EXPECT_EQ(out.read, 0);
      EXPECT_EQ(out.write, EIO);
    }
  });
}

TEST_F(Qcow2Hostile, AVersion2ImageHasNoZeroFlagAndNoCorruptBit) {
  on_fiber([&] {
    Bytes image = good_image(2);
    put(image, l2_offset(image), qcow2::kFlagZero);
    const Bytes before = image;
    const Outcome out = use(image);
    EXPECT_EQ(out.read, EIO);
    EXPECT_EQ(out.later, EIO);
    EXPECT_EQ(out.image, before);
  });
}

TEST_F(Qcow2Hostile, CompressedGarbageIsAnErrorOfThatClusterOnly) {
  on_fiber([&] {
    Bytes image = good_image();
    const uint64_t data = get(image, l2_offset(image)) & qcow2::kOffsetMask;
    std::fill_n(image.begin() + static_cast<long>(data), kCluster, std::byte{0xff});
    put(image, l2_offset(image), qcow2::kFlagCompressed | uint64_t{3} << 58 | data);
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      Bytes to(kCluster);
      EXPECT_EQ(error_number([&] { disk.read(0, base::SingleBuffer(to.data(), to.size())); }), EIO);
      disk.read(kCluster, base::SingleBuffer(to.data(), to.size()));
      disk.write(kCluster, base::SingleBuffer(to.data(), to.size()));
      disk.write(0, base::SingleBuffer(to.data(), to.size()));  // replaces it as a whole
      disk.read(0, base::SingleBuffer(to.data(), to.size()));
    }
    node->close();
  });
}

TEST_F(Qcow2Hostile, AllL1EntriesNamingOneTableIsCheckedInBoundedTime) {
  on_fiber([&] {
    auto file = make_test_image({.size = uint64_t{1} << 36, .cluster_bits = 9});
    Bytes image = file->content();
    const uint64_t l1 = l1_offset(image);
    const uint64_t entries = base::load_be<uint32_t>(image.data() + 36);
    ASSERT_GT(entries, 1'000'000U);
    const uint64_t table = image.size();
    image.resize(image.size() + 512);
    for (uint64_t i = 0; i < entries; ++i) put(image, l1 + i * 8, table | qcow2::kFlagCopied);
    const auto start = std::chrono::steady_clock::now();
    EXPECT_GE(corruptions(image), entries - 1);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  });
}

TEST_F(Qcow2Hostile, RandomlyDamagedMetadataNeverDoesMoreThanFail) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    const Bytes good = good_image();
    std::mt19937_64 random(seed);
    for (int round = 0; round < 300; ++round) {
      Bytes image = good;
      for (auto flips = 1 + random() % 8; flips > 0; --flips) {
        // The header's fields, the L1 entry, the L2 table, the refcounts: where it hurts.
        const uint64_t places[] = {random() % 112, l1_offset(good) + random() % 8,
                                   l2_offset(good) + random() % 64, get(good, 48) + random() % 8,
                                   get(good, get(good, 48)) + random() % 32};
        image[places[random() % 5]] ^= static_cast<std::byte>(1U << random() % 8);
      }
      if (random() % 4 == 0) image.resize(random() % image.size());
      auto file = std::make_shared<TestFile>();
      file->set_content(image);
      file->most_bytes = 64 << 20;
      try {
        Edge edge(file, "check", {});
        (void)qcow2::check_image(edge, [](const std::string&) {});
      } catch (const base::Error&) {
      }
      try {
        auto node = open_test_image(file);
        {
          Edge disk(node, "guest", Permissions::front_end(true));
          Bytes data(3 * kCluster);
          for (int i = 0; i < 20; ++i) {
            const uint64_t offset = random() % (kDisk - data.size());
            const base::SingleBuffer buffer(data.data(), data.size());
            error_number([&] {
              if (disk.size() < kDisk) return;
              if (i % 3 == 0) disk.read(offset, buffer);
              if (i % 3 == 1) disk.write(i < 6 ? 0 : offset, buffer);
              if (i % 3 == 2) disk.discard(i < 6 ? 0 : offset, data.size());
              if (i % 5 == 0) disk.flush();
            });
          }
        }
        error_number([&] { node->close(); });
      } catch (const base::Error&) {
      }
    }
  });
}

}  // namespace
}  // namespace minivmm::block
