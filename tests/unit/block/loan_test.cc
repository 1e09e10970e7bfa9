// SPDX-License-Identifier: Apache-2.0
// What nodes lend: the bytes where they lie, only where reading would give just them, and nothing
// moves under a loan.
#include "block/graph/loan.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <initializer_list>
#include <thread>

#include "base/io.h"
#include "base/sync.h"
#include "base/unique_fd.h"
#include "block/crypto/secret.h"
#include "block/protocols/cached_pages.h"
#include "qcow2_fixture.h"
#include "temp_directory.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kCluster = 65536;
constexpr uint64_t kMiB = uint64_t{1} << 20;
using ByteVector = std::vector<std::byte>;

// As the kernel reads it; empty: it cannot.
ByteVector through_pipe(const std::byte* data, size_t length) {
  int ends[2];
  EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const base::UniqueFd out(ends[0]), in(ends[1]);
  ByteVector result(length);
  size_t done = 0;
  while (done < length) {
    const ssize_t n = ::write(in.get(), data + done, std::min<size_t>(length - done, 4096));
    if (n <= 0) return {};
    EXPECT_EQ(::read(out.get(), result.data() + done, static_cast<size_t>(n)), n);
    done += static_cast<size_t>(n);
  }
  return result;
}

class Loans : public Qcow2Test {
 protected:
  // What is lent, read by the kernel, as those who borrow do; empty: nothing is lent.
  ByteVector lent(Handle& handle, uint64_t offset, uint64_t length) {
    Loan loan;
    if (!handle.lend(offset, length, loan)) {
      EXPECT_EQ(loan.data(), nullptr);
      return {};
    }
    ByteVector out = through_pipe(loan.data(), length);
    loan.give_back();
    return out;
  }
  // A file that is in the page cache.
  void make_file(const std::string& name, const ByteVector& content) {
    std::ofstream(path(name), std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()),
               static_cast<std::streamsize>(content.size()));
  }
  Handle attach(const std::string& keys, bool writable = true) {
    graph_.add(Options::from_keys(keys));
    return graph_.attach("disk", "test", Permissions::front_end(writable));
  }
  Handle raw_disk() {
    return attach("driver=raw,node-name=disk,file.driver=file,file.filename=" + path("raw"));
  }
};

TEST_F(Loans, ARawDisksBytesAreLentAtEveryOffset) {
  const ByteVector content = pattern_bytes(5 * kMiB, 1);
  make_file("raw", content);
  on_fiber([&] {
    Handle handle = attach(
        "driver=raw,node-name=disk,offset=4096,size=4M,file.driver=file,"
        "file.filename=" +
        path("raw"));
    for (const uint64_t offset : {0UL, 512UL, 4095UL, 2 * kMiB - 100, 4 * kMiB - 1000}) {
      EXPECT_EQ(lent(handle, offset, 1000),
                ByteVector(content.begin() + static_cast<long>(4096 + offset),
                           content.begin() + static_cast<long>(4096 + offset + 1000)));
    }
    // Outside the disk nothing is lent, though the file goes on there.
    EXPECT_TRUE(lent(handle, 4 * kMiB - 999, 1000).empty());
    EXPECT_TRUE(lent(handle, 0, 0).empty());
    EXPECT_TRUE(lent(handle, ~uint64_t{0}, 2).empty());
    handle.close();
  });
}

TEST_F(Loans, ALoanShowsWhatIsWrittenAndWhatTheDiskHasGrownBy) {
  make_file("raw", pattern_bytes(kMiB, 1));
  on_fiber([&] {
    Handle handle = raw_disk();
    EXPECT_EQ(lent(handle, 0, 4096), pattern_bytes(4096, 1));
    write_bytes(handle, 0, pattern_bytes(4096, 2));
    EXPECT_EQ(lent(handle, 0, 4096), pattern_bytes(4096, 2));
    handle.truncate(2 * kMiB);
    write_bytes(handle, kMiB + 4096, pattern_bytes(4096, 3));
    // What was not in memory when it was looked at is seen a moment later.
    ByteVector found;
    for (int i = 0; i < 200 && found.empty(); ++i) {
      found = lent(handle, kMiB + 4096, 4096);
      base::io::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(found, pattern_bytes(4096, 3));
    handle.close();
  });
}

TEST_F(Loans, WhatIsNotInMemoryIsNotLent) {
  make_file("raw", pattern_bytes(kMiB, 1));
  const base::UniqueFd fd(::open(path("raw").c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::fdatasync(fd.get()), 0);
  ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  ByteVector before(1);
  const iovec one{before.data(), 1};
  if (::preadv2(fd.get(), &one, 1, 0, RWF_NOWAIT) == 1) {
    GTEST_SKIP() << "the temporary directory's files never leave the memory";
  }
  on_fiber([&] {
    Handle handle = raw_disk();
    EXPECT_TRUE(lent(handle, 512 << 10, 4096).empty());
    handle.close();
  });
}

TEST_F(Loans, AFileWithoutThePageCacheLendsNothing) {
  make_file("raw", pattern_bytes(kMiB, 1));
  on_fiber([&] {
    const std::string why = error_text([&] {
      graph_.add(
          Options::from_keys("driver=raw,node-name=disk,file.driver=file,"
                             "file.cache.direct=on,file.filename=" +
                             path("raw")));
    });
    if (!why.empty()) GTEST_SKIP() << "no O_DIRECT: " << why;
    Handle handle = graph_.attach("disk", "test", Permissions::front_end(true));
    EXPECT_TRUE(lent(handle, 0, 4096).empty());
    handle.close();
  });
}

// Of a cut file the kernel says EFAULT; nobody dies.
TEST_F(Loans, ACutFilesBytesAreAnErrorOfTheCallThatUsesThem) {
  make_file("raw", pattern_bytes(kMiB, 1));
  on_fiber([&] {
    Handle handle = raw_disk();
    Loan loan;
    ASSERT_TRUE(handle.lend(kMiB / 2, 4096, loan));
    ASSERT_EQ(::truncate(path("raw").c_str(), 4096), 0);
    EXPECT_TRUE(through_pipe(loan.data(), 4096).empty());
    loan.give_back();
    handle.close();
  });
}

TEST_F(Loans, AQcow2DiskLendsItsDataAndItsBackingFilesAndNoZeroes) {
  make_file("base", pattern_bytes(kMiB, 1));
  create("overlay", {.size = kMiB, .backing_file = path("base"), .backing_format = "raw"});
  on_fiber([&] {
    Handle handle =
        attach("driver=qcow2,node-name=disk,file.driver=file,file.filename=" + path("overlay") +
               ",backing.driver=raw,backing.file.driver=file,"
               "backing.file.filename=" +
               path("base"));
    EXPECT_EQ(lent(handle, 0, 4096), pattern_bytes(4096, 1));  // no L2 table is needed to know it
    write_bytes(handle, kCluster, pattern_bytes(kCluster, 2));
    handle.write_zeroes(2 * kCluster, kCluster);
    EXPECT_EQ(lent(handle, kCluster, 4096), pattern_bytes(4096, 2));
    EXPECT_EQ(lent(handle, 0, 4096), pattern_bytes(4096, 1));
    EXPECT_TRUE(lent(handle, 2 * kCluster, 4096).empty());
    // Where one thing ends and another begins.
    EXPECT_TRUE(lent(handle, kCluster - 512, 1024).empty());
    EXPECT_TRUE(lent(handle, 2 * kCluster - 512, 1024).empty());
    handle.close();
  });
}

TEST_F(Loans, WhatIsEncryptedIsNotLent) {
  const std::string secret = "loans";
  crypto::secrets().add(secret, crypto::SecureBytes(std::vector<std::byte>(16, std::byte{'k'})));
  create("image", {.size = kMiB, .aes_secret = secret});
  on_fiber([&] {
    Handle handle = open("image", true, ",encrypt.format=aes,encrypt.key-secret=" + secret);
    write_bytes(handle, 0, pattern_bytes(kCluster, 1));
    EXPECT_EQ(read_bytes(handle, 0, 4096), pattern_bytes(4096, 1));
    EXPECT_TRUE(lent(handle, 0, 4096).empty());
    close(handle);
  });
  crypto::secrets().remove(secret);
}

TEST_F(Loans, CompressedClustersAndUnknownTablesAreNotLent) {
  create("compressed", {.size = kMiB});
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=qcow2,node-name=disk,file.driver=file,file.filename=" +
                                  path("compressed")));
    {
      const ByteVector same(kCluster, std::byte{7});
      Edge edge(graph_.find("disk"), "compresses", Permissions::format_file(true));
      edge.write_compressed(0, base::SingleBuffer(std::span<const std::byte>(same)));
    }
    Handle handle = graph_.attach("disk", "test", Permissions::front_end(true));
    write_bytes(handle, kCluster, pattern_bytes(kCluster, 1));
    EXPECT_TRUE(lent(handle, 0, 4096).empty());
    EXPECT_FALSE(lent(handle, kCluster, 4096).empty());
    close(handle);
    handle = open("compressed");
    // Its L2 table has not been read yet: to find it would be waiting.
    EXPECT_TRUE(lent(handle, kCluster, 4096).empty());
    (void)read_bytes(handle, kCluster, 512);
    EXPECT_FALSE(lent(handle, kCluster, 4096).empty());
    close(handle);
  });
}

// To find metadata corrupt is to write that into the image: who lends waits for nothing.
TEST_F(Loans, InvalidMetadataIsForReadsToFind) {
  create("image", {.size = kMiB});
  std::atomic<int> found{0};
  graph_.set_corruption_listener([&](const std::string&, const std::string&, bool) { ++found; });
  on_fiber([&] {
    Handle handle = open("image");
    write_bytes(handle, 0, pattern_bytes(3 * kCluster, 1));
    close(handle);
    std::fstream image(path("image"), std::ios::binary | std::ios::in | std::ios::out);
    const auto number_at = [&](uint64_t offset) {
      unsigned char bytes[8] = {};
      image.seekg(static_cast<std::streamoff>(offset)).read(reinterpret_cast<char*>(bytes), 8);
      uint64_t out = 0;
      for (const unsigned char byte : bytes) out = out << 8 | byte;
      return out;
    };
    const uint64_t l2 = number_at(number_at(40)) & 0x00fffffffffffe00;
    image.seekp(static_cast<std::streamoff>(l2 + 8 + 6)).put(2);   // not at a cluster's beginning
    image.seekp(static_cast<std::streamoff>(l2 + 16 + 2)).put(1);  // far past the file's end
    image.close();
    handle = open("image");
    (void)read_bytes(handle, 0, 512);
    EXPECT_FALSE(lent(handle, 0, 4096).empty());
    EXPECT_TRUE(lent(handle, kCluster, 4096).empty());
    EXPECT_TRUE(lent(handle, 2 * kCluster, 4096).empty());
    EXPECT_EQ(found, 0);
    EXPECT_NE(error_text([&] { (void)read_bytes(handle, kCluster, 512); }), "");
    EXPECT_EQ(found, 1);
    close(handle);
  });
}

TEST_F(Loans, FiltersBetweenAreNotGonePast) {
  make_file("raw", pattern_bytes(kMiB, 1));
  on_fiber([&] {
    Handle handle = attach(
        "driver=fault,node-name=disk,file.driver=raw,file.file.driver=file,"
        "file.file.filename=" +
        path("raw"));
    EXPECT_TRUE(lent(handle, 0, 4096).empty());
    handle.close();
  });
}

// A drain waits for loans, and lends nothing while it lasts.
TEST_F(Loans, ADrainWaitsForALoanAndNothingIsLentMeanwhile) {
  make_file("raw", pattern_bytes(kMiB, 1));
  on_fiber([&] {
    Handle handle = raw_disk();
    Loan loan;
    ASSERT_TRUE(handle.lend(0, 4096, loan));
    std::atomic<bool> drained{false};
    base::WaitGroup group;
    group.add(1);
    loops_.loop(0).spawn("drain", [&] {
      {
        const Graph::Drain drain(graph_, std::chrono::seconds(10));
        drained = true;
      }
      group.done();
    });
    base::io::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(drained);
    Loan other;
    EXPECT_FALSE(handle.lend(0, 4096, other));
    loan.give_back();
    group.wait();
    EXPECT_TRUE(drained);
    EXPECT_TRUE(handle.lend(0, 4096, other));
    other.give_back();
    handle.close();
  });
}

// A discarded cluster is not used for other data while its old bytes are lent.
TEST_F(Loans, AFreedClusterIsNotUsedAgainWhileItIsLent) {
  create("image", {.size = 64 * kMiB});
  on_fiber([&] {
    Handle handle = open("image");
    write_bytes(handle, 0, pattern_bytes(kCluster, 1));
    Loan loan;
    ASSERT_TRUE(handle.lend(0, 4096, loan));
    base::WaitGroup group;
    group.add(1);
    loops_.loop(0).spawn("writer", [&] {
      handle.discard(0, kCluster);
      for (uint64_t i = 1; i < 200; ++i) {
        write_bytes(handle, i * kCluster, pattern_bytes(kCluster, 100 + i));
        if (i % 20 == 0) handle.flush();
      }
      group.done();
    });
    for (int i = 0; i < 50; ++i) {
      base::io::sleep_for(std::chrono::milliseconds(1));
      const ByteVector now = through_pipe(loan.data(), 4096);
      // As it was, or a hole: never another cluster's.
      EXPECT_TRUE(now == pattern_bytes(4096, 1) || now == ByteVector(4096)) << i;
    }
    loan.give_back();
    group.wait();
    close(handle);
  });
}

TEST_F(Loans, AnImageThatIsClosedIsNotMappedAnyMore) {
  make_file("raw", pattern_bytes(kMiB, 1));
  const auto mapped = [&] {
    std::ifstream maps("/proc/self/maps");
    const std::string all{std::istreambuf_iterator<char>(maps), {}};
    return all.find(path("raw")) != all.npos;
  };
  on_fiber([&] {
    Handle handle = raw_disk();
    EXPECT_FALSE(lent(handle, 0, 4096).empty());
    EXPECT_TRUE(mapped());
    handle.close();
    graph_.remove("disk");
    EXPECT_FALSE(mapped());
  });
}

// --- the bound ---

class CachedPagesTest : public testing::Test {
 protected:
  // Of anonymous memory, which is always there.
  static base::UniqueFd memory(uint64_t size) {
    base::UniqueFd fd(::memfd_create("pages", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(size)), 0);
    return fd;
  }
  static void fill(int fd, uint64_t offset, uint64_t length) {
    const ByteVector bytes = pattern_bytes(length, offset);
    EXPECT_EQ(::pwrite(fd, bytes.data(), length, static_cast<off_t>(offset)),
              static_cast<ssize_t>(length));
  }
  // KiB of such files that count as this process's memory.
  static uint64_t mapped_memory() {
    std::ifstream maps("/proc/self/smaps");
    bool here = false;
    uint64_t sum = 0;
    for (std::string line; std::getline(maps, line);) {
      if (line.find('-') < line.find(' ')) here = line.find("/memfd:pages") != line.npos;
      if (here && line.starts_with("Rss:")) sum += std::stoull(line.substr(4));
    }
    return sum;
  }
};

TEST_F(CachedPagesTest, AFileLargerThanTheTableHasOnlySoMuchMappedAtATime) {
  const uint64_t bound = CachedPages::bound();
  ASSERT_GE(bound, 16 * kMiB);
  // A sparse file, of which a page in each window is there.
  const uint64_t size = 2 * bound;
  const base::UniqueFd fd = memory(size);
  for (uint64_t at = 0; at < size; at += 2 * kMiB) fill(fd.get(), at, 4096);
  const auto pages = CachedPages::map(fd.get(), size, true);
  ASSERT_NE(pages, nullptr);
  uint64_t found = 0;
  for (uint64_t at = 0; at < size; at += 2 * kMiB) {
    if (pages->find(at, 4096) != nullptr) ++found;
    EXPECT_EQ(pages->find(at + 4096, 4096), nullptr);  // a hole is not in memory
  }
  // The first half took all windows; of the second a few got one.
  EXPECT_GE(found, bound / (2 * kMiB));
  EXPECT_LT(found, size / (2 * kMiB) * 3 / 4);
  // Nobody's windows are lost for ever: who asks long enough gets one.
  const std::byte* late = nullptr;
  for (int i = 0; i < 1000 && late == nullptr; ++i) {
    late = pages->find(size - 2 * kMiB, 4096);
    ::usleep(1000);
  }
  EXPECT_NE(late, nullptr);
}

TEST_F(CachedPagesTest, FilesThatFitTogetherDoNotTakeEachOthersWindows) {
  const base::UniqueFd a = memory(4 * kMiB), b = memory(4 * kMiB);
  fill(a.get(), 0, 4 * kMiB);
  fill(b.get(), 0, 4 * kMiB);
  const auto first = CachedPages::map(a.get(), 4 * kMiB, true),
             second = CachedPages::map(b.get(), 4 * kMiB, true);
  for (int i = 0; i < 3; ++i) {
    for (uint64_t at = 0; at < 4 * kMiB; at += kMiB) {
      EXPECT_NE(first->find(at, 65536), nullptr);
      EXPECT_NE(second->find(at, 65536), nullptr);
    }
  }
}

// What was lent when a window gives way to another is used after that, and does not stay mapped.
TEST_F(CachedPagesTest, WhatIsUsedLateCountsToo) {
  const uint64_t bound = CachedPages::bound();
  constexpr uint64_t kTimes = 40;
  const base::UniqueFd fd = memory(2 * bound);
  for (uint64_t i = 0; i < kTimes; ++i) {
    fill(fd.get(), i * 2 * kMiB, 4096);
    fill(fd.get(), bound + i * 2 * kMiB, 4096);
  }
  const auto pages = CachedPages::map(fd.get(), 2 * bound, true);
  ASSERT_NE(pages, nullptr);
  const auto find = [&](uint64_t at) {
    const std::byte* found = nullptr;
    for (int n = 0; n < 1000 && found == nullptr; ++n) {
      found = pages->find(at, 4096);
      if (found == nullptr) ::usleep(1000);
    }
    return found;
  };
  for (uint64_t i = 0; i < kTimes; ++i) {
    const std::byte* const early = find(i * 2 * kMiB);
    const std::byte* const late = find(bound + i * 2 * kMiB);  // takes the other's window
    ASSERT_NE(early, nullptr);
    ASSERT_NE(late, nullptr);
    EXPECT_FALSE(through_pipe(late, 4096).empty());
    EXPECT_FALSE(through_pipe(early, 4096).empty());
  }
  // A page in each window, and in some that gave way lately.
  EXPECT_LE(mapped_memory(), (kTimes + 10) * 4);
}

// Who may not know what is in memory is told that everything is.
TEST_F(CachedPagesTest, NothingIsLentToWhomTheKernelDoesNotTell) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a file away";
  TempDirectory directory;
  const std::string name = directory / "his";
  directory.write("his", std::string(65536, 'x'));
  ASSERT_EQ(::chmod(name.c_str(), 0444), 0);
  ASSERT_EQ(::chown(name.c_str(), 12345, 12345), 0);
  const base::UniqueFd fd(::open(name.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(fd);
  EXPECT_NE(CachedPages::map(fd.get(), 65536, false), nullptr);
  // Root without root's rights, as in a container: those are a thread's.
  std::unique_ptr<CachedPages> pages;
  std::thread([&] {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    const __user_cap_data_struct none[2] = {};
    EXPECT_EQ(::syscall(SYS_capset, &header, none), 0);
    pages = CachedPages::map(fd.get(), 65536, false);
  }).join();
  EXPECT_EQ(pages, nullptr);
}

TEST_F(CachedPagesTest, FileSystemsOfSeveralHostsAreNotMapped) {
  for (const uint32_t one_hosts : {EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, TMPFS_MAGIC}) {
    EXPECT_TRUE(CachedPages::are_what_reading_gives(one_hosts, true)) << one_hosts;
    EXPECT_TRUE(CachedPages::are_what_reading_gives(one_hosts, false)) << one_hosts;
  }
  constexpr uint32_t kLustre = 0x0bd00bd0, kGpfs = 0x47504653, kVirtualBox = 0x786f4256;
  for (const uint32_t shared : std::initializer_list<uint32_t>{
           NFS_SUPER_MAGIC, CIFS_SUPER_MAGIC, SMB2_SUPER_MAGIC, FUSE_SUPER_MAGIC, V9FS_MAGIC,
           CEPH_SUPER_MAGIC, OCFS2_SUPER_MAGIC, kLustre, kGpfs, kVirtualBox, 0}) {
    EXPECT_FALSE(CachedPages::are_what_reading_gives(shared, true)) << shared;
    EXPECT_FALSE(CachedPages::are_what_reading_gives(shared, false)) << shared;
  }
  // Of a file that was opened before somebody else writes to it the mapping keeps the old one.
  EXPECT_TRUE(CachedPages::are_what_reading_gives(OVERLAYFS_SUPER_MAGIC, true));
  EXPECT_FALSE(CachedPages::are_what_reading_gives(OVERLAYFS_SUPER_MAGIC, false));
}

// The decision is made for the file: hugetlbfs is none that is known.
TEST_F(CachedPagesTest, TheFileSystemIsAsked) {
  const base::UniqueFd fd(::memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB));
  if (!fd || ::ftruncate(fd.get(), 4 * kMiB) != 0) GTEST_SKIP() << "no hugetlbfs";
  EXPECT_EQ(CachedPages::map(fd.get(), 4 * kMiB, true), nullptr);
}

// Windows change hands while others use theirs, and files go: what is found is the file's own.
TEST_F(CachedPagesTest, FilesComeAndGoWhileOthersAreUsed) {
  const uint64_t bound = CachedPages::bound();
  constexpr uint64_t kTimes = 16;
  const base::UniqueFd fd = memory(2 * bound);
  std::vector<uint64_t> places;
  for (uint64_t i = 0; i < kTimes; ++i) {
    for (const uint64_t at : {i * 2 * kMiB, bound + i * 2 * kMiB}) {
      fill(fd.get(), at, 4096);
      places.push_back(at);
    }
  }
  const auto pages = CachedPages::map(fd.get(), 2 * bound, true);
  ASSERT_NE(pages, nullptr);
  std::atomic<bool> ended{false};
  std::atomic<unsigned> found{0};
  const auto use = [&](uint64_t seed) {
    std::mt19937_64 random(seed);
    while (!ended) {
      const uint64_t at = places[random() % places.size()];
      const std::byte* const data = pages->find(at, 4096);
      if (data == nullptr) continue;
      EXPECT_EQ(through_pipe(data, 4096), pattern_bytes(4096, at));
      ++found;
    }
  };
  std::thread first(use, 1), second(use, 2);
  for (unsigned i = 0; i < 100 || found < 100; ++i) {
    const base::UniqueFd other = memory(kTimes * 2 * kMiB);
    const auto others = CachedPages::map(other.get(), kTimes * 2 * kMiB, true);
    for (uint64_t n = 0; n < kTimes; ++n) {
      EXPECT_EQ(others->find(n * 2 * kMiB, 4096), nullptr);  // nothing of it is there
    }
    ::usleep(500);
  }
  ended = true;
  first.join();
  second.join();
}

TEST_F(CachedPagesTest, ADiskIsNotPartOfACoreDump) {
  const base::UniqueFd fd = memory(kMiB);
  const auto pages = CachedPages::map(fd.get(), kMiB, true);
  ASSERT_NE(pages, nullptr);
  std::ifstream maps("/proc/self/smaps");
  bool here = false;
  unsigned found = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(' ')) here = line.find("/memfd:pages") != line.npos;
    if (!here || !line.starts_with("VmFlags:")) continue;
    EXPECT_NE(line.find(" dd"), line.npos) << line;
    ++found;
  }
  EXPECT_EQ(found, 1u);
}

TEST_F(CachedPagesTest, PastTheMappingThereIsNothing) {
  const base::UniqueFd fd = memory(kMiB);
  fill(fd.get(), 0, kMiB);
  const auto pages = CachedPages::map(fd.get(), kMiB, true);
  ASSERT_NE(pages, nullptr);
  EXPECT_NE(pages->find(kMiB - 4096, 4096), nullptr);
  EXPECT_EQ(pages->find(kMiB - 4096, 8192), nullptr);
  EXPECT_EQ(pages->find(uint64_t{1} << 50, 4096), nullptr);
  EXPECT_EQ(pages->find(~uint64_t{0} - 100, 200), nullptr);
}

}  // namespace
}  // namespace minivmm::block
