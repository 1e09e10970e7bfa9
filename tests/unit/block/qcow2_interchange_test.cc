// SPDX-License-Identifier: Apache-2.0
// Images that QEMU's tools made in ways that this driver cannot, and the state bits of images.
#include <map>

#include "base/bytes.h"
#include "block/formats/qcow2/check.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

class Qcow2Interchange : public Qcow2Test {
 protected:
  void SetUp() override {
    if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  }
  void must(const std::string& command) { ASSERT_EQ(run(command), 0) << command << last_output_; }
  // Half text-like, half random: compresses to a part.
  std::vector<std::byte> make_raw(const std::string& name, size_t size) {
    auto data = pattern_bytes(size, 5);
    for (size_t i = 0; i < size; ++i) {
      if (i / 3000 % 2 == 0) data[i] = static_cast<std::byte>(i / 100);
    }
    std::ofstream(path(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(size));
    return data;
  }
  void patch(const std::string& name, long offset, uint64_t value) {
    std::byte bytes[8];
    base::store_be(bytes, value);
    std::fstream file(path(name), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(offset);
    file.write(reinterpret_cast<const char*>(bytes), 8);
  }
  qcow2::CheckResult check(const std::string& name) {
    return on_fiber([&] {
      graph_.add(
          Options::from_keys("driver=file,node-name=checked,read-only=on,filename=" + path(name)));
      qcow2::CheckResult result;
      {
        Edge edge(graph_.find("checked"), "check", {});
        result = qcow2::check_image(edge, [](const std::string& line) { ADD_FAILURE() << line; });
      }
      graph_.remove("checked");
      return result;
    });
  }
};

TEST_F(Qcow2Interchange, CompressedClustersAreReadAndReplaced) {
  for (const char* options :
       {"compression_type=zlib", "compression_type=zstd", "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=2M", "compat=0.10"}) {
    SCOPED_TRACE(options);
    auto data = make_raw("plain.raw", 5'000'192);
    must(fmt::format("qemu-img convert -c -O qcow2 -o {} {} {}", options, path("plain.raw"),
                     path("c.qcow2")));
    on_fiber([&] {
      Handle disk = open("c.qcow2");
      EXPECT_EQ(read_bytes(disk, 0, data.size()), data);
      EXPECT_EQ(read_bytes(disk, 1234567, 100),
                std::vector<std::byte>(data.begin() + 1234567, data.begin() + 1234667));
      // Copy-on-write out of compressed clusters, which share host clusters.
      std::mt19937_64 random(1);
      for (int i = 0; i < 40; ++i) {
        const auto piece = pattern_bytes(1 + random() % 9000, random());
        const uint64_t at = random() % (data.size() - piece.size());
        std::copy(piece.begin(), piece.end(), data.begin() + static_cast<long>(at));
        write_bytes(disk, at, piece);
      }
      disk.write_zeroes(3'000'000, 700'000, {.may_unmap = true});
      std::fill_n(data.begin() + 3'000'000, 700'000, std::byte{0});
      EXPECT_EQ(read_bytes(disk, 0, data.size()), data);
      close(disk);
      disk = open("c.qcow2");
      EXPECT_EQ(read_bytes(disk, 0, data.size()), data);
      close(disk);
    });
    expect_clean("c.qcow2");
    check("c.qcow2");
  }
}

TEST_F(Qcow2Interchange, InternalSnapshotsAreKeptWhenTheDiskIsWritten) {
  for (const char* options : {"cluster_size=64k", "cluster_size=1k,refcount_bits=8"}) {
    SCOPED_TRACE(options);
    must(fmt::format("qemu-img create -f qcow2 -o {} {} 3M", options, path("s.qcow2")));
    must("qemu-io -c 'write -P 1 0 2M' " + path("s.qcow2"));
    must("qemu-img snapshot -c first " + path("s.qcow2"));
    must("qemu-io -c 'write -P 2 512k 512k' " + path("s.qcow2"));
    must("qemu-img snapshot -c second " + path("s.qcow2"));
    const auto before = check("s.qcow2");
    on_fiber([&] {
      Handle disk = open("s.qcow2");
      EXPECT_EQ(read_bytes(disk, 1 << 20, 1000), std::vector<std::byte>(1000, std::byte{1}));
      EXPECT_EQ(read_bytes(disk, 600 * 1024, 1000), std::vector<std::byte>(1000, std::byte{2}));
      write_bytes(disk, 100'000, std::vector<std::byte>(900'000, std::byte{3}));
      write_bytes(disk, 5, std::vector<std::byte>(7, std::byte{3}));
      disk.discard(1 << 20, 1 << 19);
      disk.write_zeroes(1'700'000, 100'000, {});
      close(disk);
    });
    const auto after = check("s.qcow2");
    EXPECT_EQ(before.total_clusters, after.total_clusters);
    expect_clean("s.qcow2");
    must(
        "qemu-io -c 'read -P 3 100000 900000' -c 'read -P 0 1M 512k' -c 'read -P 0 1700000 100000'"
        " -c 'read -P 1 1900000 100000' " +
        path("s.qcow2"));
    must("qemu-img snapshot -a second " + path("s.qcow2"));
    must("qemu-io -c 'read -P 1 0 512k' -c 'read -P 2 512k 512k' -c 'read -P 1 1M 1M' " +
         path("s.qcow2"));
    must("qemu-img snapshot -a first " + path("s.qcow2"));
    must("qemu-io -c 'read -P 1 0 2M' " + path("s.qcow2"));
    must("qemu-img snapshot -d first " + path("s.qcow2"));
    must("qemu-img snapshot -d second " + path("s.qcow2"));
    expect_clean("s.qcow2");
  }
}

TEST_F(Qcow2Interchange, PreallocatedImagesAreWrittenInPlace) {
  for (const char* mode : {"metadata", "falloc", "full"}) {
    must(fmt::format("qemu-img create -f qcow2 -o preallocation={} {} 4M", mode, path("p.qcow2")));
    const auto size = std::filesystem::file_size(path("p.qcow2"));
    on_fiber([&] {
      Handle disk = open("p.qcow2");
      EXPECT_EQ(read_bytes(disk, 0, 4 << 20), std::vector<std::byte>(4 << 20));
      write_bytes(disk, 1000, std::vector<std::byte>(3'000'000, std::byte{4}));
      close(disk);
    });
    EXPECT_EQ(std::filesystem::file_size(path("p.qcow2")), size);
    expect_clean("p.qcow2");
  }
}

TEST_F(Qcow2Interchange, RecordedBackingChainsOfDifferentLengthsAreFollowed) {
  make_raw("base.raw", 1'000'448);
  must("cd " + directory_ + " && qemu-img create -f qcow2 -b base.raw -F raw mid.qcow2 3M");
  must("cd " + directory_ + " && qemu-img create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 2M");
  must("qemu-io -c 'write -P 8 900000 200000' " + path("mid.qcow2"));
  must("qemu-io -c 'write -P 9 1500000 600000' " + path("mid.qcow2"));
  on_fiber([&] {
    Handle disk = open("top.qcow2");
    write_bytes(disk, 950'000, std::vector<std::byte>(5000, std::byte{7}));
    BlockStatus status = disk.block_status(0, 65536);
    EXPECT_EQ(status.depth, 2U);
    EXPECT_FALSE(status.allocated);
    status = disk.block_status(14 * 65536, 65536);
    EXPECT_EQ(status.depth, 0U);
    EXPECT_TRUE(status.allocated);
    close(disk);
  });
  expect_clean("top.qcow2");
  // QEMU sees through our overlay what our own reading sees.
  must("cd " + directory_ + " && qemu-img convert -O raw top.qcow2 by-qemu.raw");
  on_fiber([&] {
    Handle disk = open("top.qcow2", false);
    const auto ours = read_bytes(disk, 0, 2 << 20);
    std::ifstream in(path("by-qemu.raw"), std::ios::binary);
    std::string theirs(std::istreambuf_iterator<char>(in), {});
    ASSERT_EQ(theirs.size(), ours.size());
    EXPECT_EQ(std::memcmp(theirs.data(), ours.data(), ours.size()), 0);
    close(disk);
  });
}

TEST_F(Qcow2Interchange, BackingCanBeGivenOrLeftOut) {
  make_raw("other.raw", 1 << 20);
  must("cd " + directory_ + " && qemu-img create -f qcow2 -u -b gone.raw -F raw top.qcow2 1M");
  on_fiber([&] {
    EXPECT_NE(error_number([&] { open("top.qcow2"); }), 0);
    Handle disk = open("top.qcow2", true, ",backing=");
    EXPECT_EQ(read_bytes(disk, 0, 1000), std::vector<std::byte>(1000));
    close(disk);
    const std::string inline_backing =
        ",backing.driver=raw,backing.file.driver=file,backing.file.filename=" + path("other.raw");
    disk = open("top.qcow2", true, inline_backing);
    EXPECT_NE(read_bytes(disk, 0, 5000), std::vector<std::byte>(5000));
    close(disk);
  });
}

TEST_F(Qcow2Interchange, CorruptImagesAreOnlyRead) {
  create("d.qcow2", {.size = 1 << 20});
  patch("d.qcow2", 72, qcow2::kIncompatCorrupt);
  on_fiber([&] {
    const std::string text = error_text([&] { open("d.qcow2"); });
    EXPECT_NE(text.find("minivmm image check -r all"), std::string::npos) << text;
    Handle disk = open("d.qcow2", false);
    EXPECT_EQ(read_bytes(disk, 0, 512), std::vector<std::byte>(512));
    close(disk);
  });
}

// Others can have lazy refcounts by an option, so the image does not say why it is dirty. What
// counting does not mend keeps it from being written to.
TEST_F(Qcow2Interchange, DirtyImagesAreMendedWhereTheyCanBe) {
  create("d.qcow2", {.size = 1 << 20});
  patch("d.qcow2", 72, qcow2::kIncompatDirty);
  on_fiber([&] {
    Handle disk = open("d.qcow2");
    write_bytes(disk, 0, std::vector<std::byte>(512, std::byte{1}));
    close(disk);
  });
  expect_clean("d.qcow2");
}

TEST_F(Qcow2Interchange, LazyRefcountsByAnOption) {
  create("l.qcow2", {.size = 1 << 20});
  on_fiber([&] {
    Handle disk = open("l.qcow2", true, ",lazy-refcounts=on");
    write_bytes(disk, 0, std::vector<std::byte>(512, std::byte{1}));
    disk.flush();
    std::filesystem::copy_file(path("l.qcow2"), path("crashed.qcow2"));
    close(disk);
  });
  expect_clean("l.qcow2");
  EXPECT_NE(run("qemu-img check " + path("crashed.qcow2")), 0) << "refcounts were not lazy";
  create("always.qcow2", {.size = 1 << 20, .lazy_refcounts = true});
  on_fiber([&] {
    Handle disk = open("always.qcow2", true, ",lazy-refcounts=off");
    write_bytes(disk, 0, std::vector<std::byte>(512, std::byte{1}));
    disk.flush();
    std::filesystem::copy_file(path("always.qcow2"), path("sound.qcow2"));
    close(disk);
    disk = open("crashed.qcow2");
    EXPECT_EQ(read_bytes(disk, 0, 512), std::vector<std::byte>(512, std::byte{1}));
    close(disk);
  });
  expect_clean("sound.qcow2");
  expect_clean("crashed.qcow2");
  create("old.qcow2", {.size = 1 << 20, .version = 2});
  on_fiber([&] {
    const std::string text = error_text([&] { open("old.qcow2", true, ",lazy-refcounts=on"); });
    EXPECT_NE(text.find("Lazy refcounts require"), std::string::npos) << text;
  });
}

// Options about what there is no choice of: the one that is so is taken, others are refused by
// name.
TEST_F(Qcow2Interchange, OptionsThatAreAlwaysSo) {
  create("o.qcow2", {.size = 1 << 20});
  on_fiber([&] {
    Handle disk = open("o.qcow2", true,
                       ",pass-discard-request=on,pass-discard-snapshot=on,pass-discard-other=on,"
                       "overlap-check=cached,cache-clean-interval=0");
    close(disk);
    for (const char* refused : {"pass-discard-request=off", "pass-discard-other=off",
                                "overlap-check=all", "cache-clean-interval=600"}) {
      const std::string text =
          error_text([&] { open("o.qcow2", true, fmt::format(",{}", refused)); });
      const std::string option(refused, std::strchr(refused, '='));
      EXPECT_NE(text.find(option), std::string::npos) << text;
    }
  });
}

// The dirty bit is there while the image is written to, so that QEMU counts references anew as
// well; it is gone after closing, and an image that was not closed is mended when it is opened.
TEST_F(Qcow2Interchange, LazyRefcountsAreCountedAnewAfterACrash) {
  create("lazy.qcow2", {.size = 4 << 20, .cluster_bits = 12, .lazy_refcounts = true});
  const std::vector<std::byte> data(300'000, std::byte{5});
  on_fiber([&] {
    Handle disk = open("lazy.qcow2");
    write_bytes(disk, 100'000, data);
    disk.flush();
    // What a crash would leave now.
    std::filesystem::copy_file(path("lazy.qcow2"), path("crashed.qcow2"));
    close(disk);
  });
  expect_clean("lazy.qcow2");
  must("qemu-img info " + path("crashed.qcow2"));
  EXPECT_NE(last_output_.find("lazy refcounts: true"), std::string::npos) << last_output_;
  EXPECT_NE(run("qemu-img check " + path("crashed.qcow2")), 0) << "refcounts were not lazy";
  std::filesystem::copy_file(path("crashed.qcow2"), path("for-qemu.qcow2"));
  must("qemu-io -f qcow2 -c 'read -P 5 100000 300000' " + path("for-qemu.qcow2"));
  expect_clean("for-qemu.qcow2");
  on_fiber([&] {
    Handle disk = open("crashed.qcow2");
    EXPECT_EQ(read_bytes(disk, 100'000, data.size()), data);
    write_bytes(disk, 2'000'000, data);
    close(disk);
  });
  expect_clean("crashed.qcow2");
}

TEST_F(Qcow2Interchange, BitmapsAreKeptByReadingAndByWriting) {
  must("qemu-img create -f qcow2 " + path("b.qcow2") + " 1M");
  must("qemu-img bitmap --add " + path("b.qcow2") + " daily");
  EXPECT_EQ(check("b.qcow2").leaks, 0U);
  on_fiber([&] {
    Handle disk = open("b.qcow2");
    EXPECT_EQ(read_bytes(disk, 0, 512), std::vector<std::byte>(512));
    close(disk);
  });
  must("qemu-img info " + path("b.qcow2"));
  EXPECT_NE(last_output_.find("daily"), std::string::npos) << "reading must not drop it";
  on_fiber([&] {
    Handle disk = open("b.qcow2");
    write_bytes(disk, 0, std::vector<std::byte>(512, std::byte{1}));
    close(disk);
  });
  must("qemu-img info " + path("b.qcow2"));
  EXPECT_NE(last_output_.find("daily"), std::string::npos);
  EXPECT_EQ(last_output_.find("in-use"), std::string::npos) << "it was stored when it was closed";
  expect_clean("b.qcow2");
}

TEST_F(Qcow2Interchange, CheckCountsAsQemuDoes) {
  make_raw("plain.raw", 3'000'320);
  must(fmt::format("qemu-img convert -c -O qcow2 {} {}", path("plain.raw"), path("n.qcow2")));
  must("qemu-io -c 'write 100000 500000' -c 'write -z 2M 128k' -c 'discard 1M 256k' " +
       path("n.qcow2"));
  const auto ours = check("n.qcow2");
  must("qemu-img check --output=json " + path("n.qcow2"));
  const auto theirs = [&](const std::string& key) -> uint64_t {
    const size_t at = last_output_.find("\"" + key + "\": ");
    return at == std::string::npos ? 0 : std::stoull(last_output_.substr(at + key.size() + 4));
  };
  EXPECT_EQ(ours.image_end_offset, theirs("image-end-offset"));
  EXPECT_EQ(ours.total_clusters, theirs("total-clusters"));
  EXPECT_EQ(ours.allocated_clusters, theirs("allocated-clusters"));
  EXPECT_EQ(ours.fragmented_clusters, theirs("fragmented-clusters"));
  EXPECT_EQ(ours.compressed_clusters, theirs("compressed-clusters"));
}

// A check of an image with many snapshots once read the tables that they share for each of them.
TEST_F(Qcow2Interchange, TablesThatSnapshotsShareAreCheckedOnce) {
  must("qemu-img create -f qcow2 -o cluster_size=4k " + path("s.qcow2") + " 8M");
  must("qemu-io -c 'write -P 1 0 6M' " + path("s.qcow2"));
  for (int i = 0; i < 20; ++i) {
    must(fmt::format("qemu-img snapshot -c s{} {}", i, path("s.qcow2")));
    must(fmt::format("qemu-io -c 'write -P 2 {} 4k' {}", i * 4096, path("s.qcow2")));
  }
  std::ifstream in(path("s.qcow2"), std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto bytes = std::as_bytes(std::span(text));
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    file->set_content({bytes.begin(), bytes.end()});
    std::map<uint64_t, int> reads;
    file->before = [&](TestFile::Op, uint64_t offset, uint64_t) { ++reads[offset]; };
    Edge edge(file, "check", {});
    const auto result =
        qcow2::check_image(edge, [](const std::string& line) { ADD_FAILURE() << line; });
    EXPECT_EQ(result.allocated_clusters, 1536U);
    for (const auto& [offset, count] : reads) EXPECT_LE(count, 3) << offset;
  });
}

TEST_F(Qcow2Interchange, ALargeSparseDiskGrowsItsRefcountTable) {
  // 512-byte clusters with 64-bit refcounts: a table cluster covers 2 MiB of file.
  create("g.qcow2", {.size = 12 << 20, .cluster_bits = 9, .refcount_order = 6});
  const auto data = pattern_bytes(12 << 20, 77);
  on_fiber([&] {
    Handle disk = open("g.qcow2");
    for (size_t at = 0; at < data.size(); at += 100'000) {
      const size_t n = std::min<size_t>(100'000, data.size() - at);
      disk.write(at, base::SingleBuffer(std::span(data).subspan(at, n)));
      if (at % 700'000 == 0) disk.flush();
    }
    EXPECT_EQ(read_bytes(disk, 0, data.size()), data);
    close(disk);
    disk = open("g.qcow2", false);
    EXPECT_EQ(read_bytes(disk, 0, data.size()), data);
    close(disk);
  });
  expect_clean("g.qcow2");
}

}  // namespace
}  // namespace minivmm::block
