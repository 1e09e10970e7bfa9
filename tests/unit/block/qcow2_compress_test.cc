// SPDX-License-Identifier: Apache-2.0
// Compressed writes: they read back, share host clusters as far as refcounts can say so, are
// overwritten and discarded like any other cluster, and QEMU reads them.
#include <array>
#include <cerrno>

#include <fmt/core.h>
#include <zlib.h>

#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/compress.h"
#include "crash_states.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

// Compresses to about `percent` of its size.
std::vector<std::byte> compressible(size_t size, unsigned percent, uint64_t seed) {
  auto out = pattern_bytes(size, seed);
  std::fill(out.begin() + static_cast<long>(size * percent / 100), out.end(), std::byte{0x11});
  return out;
}

void write_packed(Edge& disk, uint64_t offset, const std::vector<std::byte>& bytes) {
  disk.write_compressed(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
}

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  qcow2::Compression compression = qcow2::Compression::kZlib;
  bool extended_l2 = false;
};

class Qcow2Compress : public GraphTest, public testing::WithParamInterface<Case> {
 protected:
  std::shared_ptr<TestFile> make(uint64_t size) {
    const Case& c = GetParam();
    return make_test_image({.size = size,
                            .version = c.version,
                            .cluster_bits = c.cluster_bits,
                            .refcount_order = c.refcount_order,
                            .compression = c.compression,
                            .extended_l2 = c.extended_l2});
  }
  static qcow2::CheckResult check(const std::shared_ptr<Node>& file) {
    std::string lines;
    Edge edge(file, "check", {0, Permissions::kWrite | Permissions::kResize});
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    EXPECT_EQ(result.corruptions + result.check_errors, 0U) << lines;
    EXPECT_EQ(result.leaks, 0U) << lines;
    return result;
  }
};

// Readers that keep no more of what they have unpacked than the format asks for.
TEST(Qcow2Deflate, NothingIsFartherBackThanAWindowOf4KiB) {
  const auto block = compressible(8192, 60, 1);
  std::vector<std::byte> plain;
  for (int i = 0; i < 4; ++i) plain.insert(plain.end(), block.begin(), block.end());
  std::vector<std::byte> packed(plain.size());
  packed.resize(qcow2::compress(qcow2::Compression::kZlib, plain, packed));
  ASSERT_GT(packed.size(), 0U);
  z_stream stream{};
  ASSERT_EQ(inflateInit2(&stream, -12), Z_OK);
  // SAFETY: zlib only reads the input.
  stream.next_in = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_in = static_cast<uInt>(packed.size());
  std::vector<std::byte> out;
  int result = Z_OK;
  while (result == Z_OK) {
    std::array<std::byte, 1000> piece;  // the rest must be in the window
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = piece.size();
    result = inflate(&stream, Z_NO_FLUSH);
    out.insert(out.end(), piece.begin(), piece.end() - static_cast<long>(stream.avail_out));
  }
  EXPECT_EQ(result, Z_STREAM_END) << (stream.msg != nullptr ? stream.msg : "");
  inflateEnd(&stream);
  EXPECT_TRUE(out == plain);
}

TEST_P(Qcow2Compress, RandomRequestsMatchAModel) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    std::mt19937_64 random(seed);
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    // The last cluster is a short one.
    std::vector<std::byte> model(24 * cluster + 512 * (cluster > 512 ? 1 : 0));
    const uint64_t clusters = (model.size() + cluster - 1) / cluster;
    auto file = make(model.size());
    auto node = open_test_image(file);
    auto disk = std::make_unique<Edge>(node, "guest", Permissions::front_end(true));
    for (int step = 0; step < 150; ++step) {
      const uint64_t at = random() % clusters * cluster;
      const auto kind = random() % 8;
      if (kind < 4) {
        const uint64_t length = std::min((1 + random() % 3) * cluster, model.size() - at);
        const auto bytes =
            compressible(length, static_cast<unsigned>(random() % 110) % 101, random());
        write_packed(*disk, at, bytes);
        std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<long>(at));
      } else if (kind == 4) {
        const uint64_t from = random() % model.size();
        const auto bytes = pattern_bytes(1 + random() % (model.size() - from), random());
        disk->write(from, base::SingleBuffer(std::span<const std::byte>(bytes)));
        std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<long>(from));
      } else if (kind == 5) {
        const uint64_t length = std::min(cluster * 2, model.size() - at);
        disk->write_zeroes(at, length, {.may_unmap = true});
        std::fill_n(model.begin() + static_cast<long>(at), length, std::byte{0});
      } else if (kind == 6) {
        disk->flush();
      } else if (random() % 3 == 0) {
        disk.reset();
        node->close();
        node.reset();
        check(file);
        node = open_test_image(file);
        disk = std::make_unique<Edge>(node, "guest", Permissions::front_end(true));
      }
      std::vector<std::byte> got(model.size());
      disk->read(0, base::SingleBuffer(got.data(), got.size()));
      ASSERT_EQ(got, model) << "after step " << step;
    }
    disk.reset();
    node->close();
    check(file);
  });
}

TEST_P(Qcow2Compress, SmallOnesShareHostClusters) {
  on_fiber([&] {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    auto file = make(64 * cluster);
    auto node = open_test_image(file);
    const uint64_t before = file->size();
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      for (uint64_t i = 0; i < 64; ++i) {
        write_packed(disk, i * cluster, compressible(cluster, 30, i + 1));
      }
    }
    node->close();
    EXPECT_EQ(check(file).compressed_clusters, 64U);
    // Refcounts of one bit cannot say that two share one.
    if (GetParam().refcount_order >= 4 && GetParam().cluster_bits >= 12) {
      EXPECT_LT(file->size() - before, 40 * cluster);
    }
  });
}

TEST_P(Qcow2Compress, WhatIsNotWholeClustersIsRefused) {
  on_fiber([&] {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    auto node = open_test_image(make(8 * cluster));
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      for (const auto& [at, length] :
           {std::pair{uint64_t{1}, cluster}, std::pair{uint64_t{0}, cluster - 1},
            std::pair{cluster, cluster + 100}}) {
        try {
          write_packed(disk, at, std::vector<std::byte>(length));
          ADD_FAILURE() << at << ", " << length;
        } catch (const base::Error& e) {
          EXPECT_EQ(e.err(), EINVAL);
        }
      }
    }
    node->close();
  });
}

TEST_P(Qcow2Compress, AFailedWriteLeavesTheOldContent) {
  on_fiber([&] {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    auto file = make(8 * cluster);
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const auto old = compressible(cluster, 20, 1);
      write_packed(disk, 0, old);
      disk.flush();
      bool armed = true;
      file->before = [&](TestFile::Op op, uint64_t, uint64_t) {
        if (op == TestFile::Op::kWrite && std::exchange(armed, false)) {
          throw base::Error(EIO, "injected");
        }
      };
      EXPECT_THROW(write_packed(disk, 0, compressible(cluster, 20, 2)), base::Error);
      file->before = nullptr;
      std::vector<std::byte> got(cluster);
      disk.read(0, base::SingleBuffer(got.data(), got.size()));
      EXPECT_EQ(got, old);
    }
    node->close();
    check(file);
  });
}

TEST_P(Qcow2Compress, APowerCutLeavesWhatWasFlushed) {
  const unsigned states = crash_states(40);
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  on_fiber([&] {
    std::mt19937_64 random(seed);
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    auto file = make(32 * cluster);
    std::vector<uint64_t> flushed(32, 0);  // when the first content was durable
    {
      auto node = open_test_image(file);
      file->start_log();
      {
        Edge disk(node, "guest", Permissions::front_end(true));
        for (uint64_t i = 0; i < 32; ++i) {
          write_packed(disk, i * cluster, compressible(cluster, 25, i + 1));
          if (i % 4 != 3) continue;
          disk.flush();
          for (uint64_t k = i - 3; k <= i; ++k) flushed[k] = file->now();
        }
      }
      node->close();
    }
    const uint64_t end = file->now();
    for (unsigned n = 0; n < states && !HasFatalFailure(); ++n) {
      const uint64_t cut = random() % (end + 1);
      auto after = std::make_shared<TestFile>();
      after->set_content(file->after_power_cut(cut, random));
      std::string lines;
      {
        Edge edge(after, "check", {0, Permissions::kWrite | Permissions::kResize});
        const auto result =
            qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
        ASSERT_EQ(result.corruptions + result.check_errors, 0U) << lines;
      }
      auto node = open_test_image(after);
      {
        Edge disk(node, "guest", Permissions::front_end(true));
        for (uint64_t i = 0; i < 32; ++i) {
          std::vector<std::byte> got(cluster);
          disk.read(i * cluster, base::SingleBuffer(got.data(), got.size()));
          const bool there = got == compressible(cluster, 25, i + 1);
          ASSERT_TRUE(there || (flushed[i] > cut && base::is_zero(std::span(got))))
              << "cluster " << i << ", cut " << cut;
        }
      }
      node->close();
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Formats, Qcow2Compress,
                         testing::Values(Case{"v3_64k_zlib", 3, 16, 4},
                                         Case{"v3_64k_zstd", 3, 16, 4, qcow2::Compression::kZstd},
                                         Case{"v2_4k_zlib", 2, 12, 4}, Case{"v3_512_zlib", 3, 9, 4},
                                         Case{"v3_4k_narrow_refcounts", 3, 12, 0},
                                         Case{"v3_4k_refcounts_of_two_bits", 3, 12, 1},
                                         Case{"v3_16k_extended_zstd", 3, 14, 4,
                                              qcow2::Compression::kZstd, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

class Qcow2CompressInterchange : public Qcow2Test {};

TEST_F(Qcow2CompressInterchange, QemuReadsThem) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is not installed";
  for (const auto compression : {qcow2::Compression::kZlib, qcow2::Compression::kZstd}) {
    for (const unsigned bits : {9U, 12U, 16U, 21U}) {
      SCOPED_TRACE(
          fmt::format("compression {}, cluster bits {}", static_cast<int>(compression), bits));
      const uint64_t cluster = uint64_t{1} << bits;
      const auto bytes = compressible(5 * cluster, 45, bits);
      create("disk.qcow2",
             {.size = bytes.size(), .cluster_bits = bits, .compression = compression});
      on_fiber([&] {
        graph_.add(Options::from_keys(
            "driver=qcow2,node-name=disk,file.driver=file,file.filename=" + path("disk.qcow2")));
        {
          Edge disk(graph_.find("disk"), "test", Permissions::front_end(true));
          for (uint64_t i = 0; i < 5; ++i) {
            write_packed(disk, i * cluster,
                         {bytes.begin() + static_cast<long>(i * cluster),
                          bytes.begin() + static_cast<long>((i + 1) * cluster)});
          }
        }
        graph_.remove("disk");
      });
      expect_clean("disk.qcow2");
      std::ofstream(path("disk.raw"), std::ios::binary)
          // SAFETY: bytes as characters.
          .write(reinterpret_cast<const char*>(bytes.data()),
                 static_cast<std::streamsize>(bytes.size()));
      EXPECT_EQ(run(fmt::format("qemu-img compare -f qcow2 -F raw {} {}", path("disk.qcow2"),
                                path("disk.raw"))),
                0)
          << last_output_;
    }
  }
}

// The filter stores whole clusters compressed, wherever in a request they lie, and the rest
// plainly.
TEST_F(Qcow2CompressInterchange, TheFilterCompressesWholeClusters) {
  constexpr uint64_t kCluster = 65536;
  create("disk.qcow2", {.size = 10 * kCluster + 512});
  std::vector<std::byte> model(10 * kCluster + 512);
  on_fiber([&] {
    graph_.add(
        Options::from_keys("driver=compress,node-name=disk,file.driver=qcow2,file.file.driver=file,"
                           "file.file.filename=" +
                           path("disk.qcow2")));
    Handle disk = graph_.attach("disk", "test", Permissions::front_end(true));
    const auto put = [&](uint64_t at, uint64_t length) {
      const auto bytes = compressible(length, 30, at + 1);
      write_bytes(disk, at, bytes);
      std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<long>(at));
    };
    put(1000, 3 * kCluster);            // clusters 1 and 2 are whole
    put(5 * kCluster, 2 * kCluster);    // both
    put(8 * kCluster + 1, 1000);        // none
    put(9 * kCluster, kCluster + 512);  // to the end of the disk: two
    EXPECT_EQ(read_bytes(disk, 0, model.size()), model);
    disk.flush();
    disk.close();
    graph_.remove("disk");
    graph_.add(Options::from_keys("driver=memory,node-name=plain,size=1M"));
    EXPECT_EQ(error_number([&] {
                graph_.add(Options::from_keys("driver=compress,node-name=no,file=plain"));
              }),
              ENOTSUP);
  });
  expect_clean("disk.qcow2");
  EXPECT_EQ(run("qemu-img check --output=json " + path("disk.qcow2")), 0);
  EXPECT_NE(last_output_.find("\"compressed-clusters\": 6"), std::string::npos) << last_output_;
}

}  // namespace
}  // namespace minivmm::block
