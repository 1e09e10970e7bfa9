// SPDX-License-Identifier: Apache-2.0
// The search on file systems that mke2fs made.
#include "bootdisk/finder.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "tests/unit/bootdisk/memory_source.h"

namespace minivmm::bootdisk {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kMiB = 1 << 20;

class FinderTest : public testing::Test {
 protected:
  FinderTest() {
    std::string name = (fs::temp_directory_path() / "bootdisk-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    folder_ = name;
  }
  ~FinderTest() override { fs::remove_all(folder_); }

  void file(const std::string& path, const std::string& text) {
    fs::create_directories((folder_ / "tree" / path).parent_path());
    std::ofstream(folder_ / "tree" / path) << text;
  }
  // The tree so far as a file system; the tree is empty afterwards.
  std::vector<std::byte> file_system(uint64_t size, const std::string& options = "-t ext4") {
    const std::string image = folder_ / "image";
    const std::string command =
        fmt::format("mke2fs -q {} -d {} {} {}k >{} 2>&1", options, (folder_ / "tree").string(),
                    image, size >> 10, (folder_ / "log").string());
    if (std::system(command.c_str()) != 0) throw std::runtime_error("mke2fs failed: " + command);
    std::ifstream in(image, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(in), {}};
    fs::remove(image);
    fs::remove_all(folder_ / "tree");
    const auto* begin = reinterpret_cast<const std::byte*>(text.data());
    return {begin, begin + text.size()};
  }
  static std::string content(const Finder& finder, const std::string& path) {
    std::string out;
    finder.copy(path, kMiB, [&](std::span<const std::byte> bytes) {
      out.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    });
    return out;
  }

  fs::path folder_;
};

TEST_F(FinderTest, GrubConfigOnTheWholeDisk) {
  file("boot/grub/grub.cfg",
       "menuentry gone {\n linux /boot/vmlinuz-9 x\n}\n"
       "menuentry here {\n linux /boot/vmlinuz-1 root=/dev/vda ro\n initrd /boot/a /boot/b\n}\n");
  file("boot/vmlinuz-1", "kernel");
  file("boot/a", "first");
  file("boot/b", std::string(300'000, 'z'));
  for (const char* options : {"-t ext4", "-t ext2 -b 1024", "-t ext4 -O inline_data -I 256"}) {
    fs::copy(folder_ / "tree", folder_ / "kept", fs::copy_options::recursive);
    MemorySource disk(file_system(8 * kMiB, options));
    fs::rename(folder_ / "kept", folder_ / "tree");
    Finder finder(disk);
    const auto found = finder.find();
    ASSERT_TRUE(found) << options;
    EXPECT_EQ(found->entry.title, "here");
    EXPECT_EQ(found->entry.arguments, "root=/dev/vda ro");
    EXPECT_EQ(found->origin, "the disk: /boot/grub/grub.cfg");
    EXPECT_EQ(content(finder, found->entry.kernel), "kernel");
    EXPECT_EQ(content(finder, found->entry.initrds[0]), "first");
    EXPECT_EQ(content(finder, found->entry.initrds[1]), std::string(300'000, 'z'));
    EXPECT_THAT(finder.notes(), IsEmpty());
  }
}

TEST_F(FinderTest, ASeparateBootPartition) {
  file("etc/fstab", "");
  file("sbin/init", "");
  file("boot/readme", "");
  const auto root = file_system(4 * kMiB);
  file("vmlinuz-6.9", "old");
  file("vmlinuz-6.10", "new");
  file("vmlinuz-0-rescue-1", "rescue");
  file("initramfs-6.10.img", "ramdisk");
  const auto boot = file_system(4 * kMiB);

  MemorySource disk(16 * kMiB);
  base::store_le<uint32_t>(&disk.bytes[440], 0x12345678);
  base::store_le<uint16_t>(&disk.bytes[510], 0xaa55);
  for (unsigned i = 0; i < 2; ++i) {
    std::byte* const entry = &disk.bytes[446 + 16 * i];
    entry[4] = std::byte{0x83};
    base::store_le<uint32_t>(entry + 8, (1 + 5 * i) * 2048);
    base::store_le<uint32_t>(entry + 12, 4 * 2048);
    const auto& from = i == 0 ? boot : root;
    std::copy(from.begin(), from.end(),
              disk.bytes.begin() + static_cast<ptrdiff_t>((1 + 5 * i) * kMiB));
  }
  Finder finder(disk);
  const auto found = finder.find();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->entry.kernel, "/vmlinuz-6.10");
  EXPECT_THAT(found->entry.initrds, ElementsAre("/initramfs-6.10.img"));
  EXPECT_EQ(found->entry.arguments, "root=PARTUUID=12345678-02 rw");
  EXPECT_EQ(content(finder, found->entry.kernel), "new");
}

TEST_F(FinderTest, LoaderEntriesTheNewestFirst) {
  file("boot/grub2/grubenv", "kernelopts=quiet\n");
  file("boot/loader/entries/m-6.5.conf", "linux /boot/k5\noptions a $kernelopts\n");
  file("boot/loader/entries/m-6.10.conf", "linux /boot/k10\noptions b $kernelopts\n");
  file("boot/loader/entries/m-9.conf.old", "linux /boot/k5\n");
  file("boot/k5", "5");
  file("boot/k10", "10");
  MemorySource disk(file_system(4 * kMiB));
  Finder finder(disk);
  const auto found = finder.find();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->entry.kernel, "/boot/k10");
  EXPECT_EQ(found->entry.arguments, "b quiet");
}

TEST_F(FinderTest, LinksAreFollowedInsideTheFileSystemOnly) {
  file("boot/real", "kernel");
  file("boot/extlinux/extlinux.conf", "LABEL a\nKERNEL ../link\nLABEL b\nKERNEL /boot/real\n");
  fs::create_symlink("/boot/real", folder_ / "tree/boot/link");
  fs::create_symlink("loop", folder_ / "tree/boot/loop");
  MemorySource disk(file_system(4 * kMiB));
  Finder finder(disk);
  const auto found = finder.find();
  ASSERT_TRUE(found);
  EXPECT_EQ(content(finder, found->entry.kernel), "kernel");
  EXPECT_THROW(content(finder, "/boot/loop"), base::Error);
  EXPECT_THROW(content(finder, "/boot"), base::Error);
}

TEST_F(FinderTest, WhatIsTooLargeIsRefused) {
  file("boot/vmlinuz-1", std::string(2 * kMiB, 'k'));
  MemorySource disk(file_system(8 * kMiB));
  Finder finder(disk);
  const auto found = finder.find();
  ASSERT_TRUE(found);
  try {
    content(finder, found->entry.kernel);
    FAIL() << "it was copied";
  } catch (const base::Error& e) {
    EXPECT_THAT(e.what(), HasSubstr("2097152 bytes are more than 1048576"));
  }
}

TEST_F(FinderTest, NothingOnEmptyDisks) {
  MemorySource zeroes(4 * kMiB);
  EXPECT_FALSE(Finder(zeroes).find());
  file("home/x", "");
  MemorySource data(file_system(4 * kMiB));
  EXPECT_FALSE(Finder(data).find());
}

// What mke2fs makes today, and may make of options: file systems of other versions and settings.
TEST_F(FinderTest, FileSystemsWithAllKindsOfFeatures) {
  for (const char* options :
       {"-t ext2", "-t ext3", "-t ext4 -O metadata_csum,metadata_csum_seed,orphan_file",
        "-t ext4 -b 1024 -O ^64bit,inline_data", "-t ext4 -b 4096 -O bigalloc,quota,project",
        "-t ext4 -O casefold,encrypt,verity,ea_inode,large_dir", "-t ext4 -O meta_bg,^resize_inode",
        "-t ext4 -O sparse_super2,stable_inodes",
        "-t ext4 -I 128 -O ^64bit,^extents,^metadata_csum",
        "-t ext4 -O flex_bg,uninit_bg,^metadata_csum -G 4"}) {
    SCOPED_TRACE(options);
    file("boot/grub/grub.cfg", "menuentry x {\n linux /boot/vmlinuz-1 a\n}\n");
    file("boot/vmlinuz-1", std::string(50'000, 'k'));
    MemorySource disk(file_system(16 * kMiB, options));
    Finder finder(disk);
    EXPECT_THAT(finder.notes(), IsEmpty());
    const auto found = finder.find();
    ASSERT_TRUE(found);
    EXPECT_EQ(content(finder, found->entry.kernel), std::string(50'000, 'k'));
  }
}

// A feature of years to come, without which the file system cannot be understood.
TEST_F(FinderTest, AnUnknownFeatureIsNamedAsTheReason) {
  file("boot/vmlinuz-1", "kernel");
  MemorySource disk(file_system(4 * kMiB, "-t ext4 -O ^metadata_csum"));
  constexpr size_t kIncompatible = 1024 + 0x60;
  disk.bytes[kIncompatible + 3] |= std::byte{0x40};
  Finder finder(disk);
  EXPECT_FALSE(finder.find());
  EXPECT_THAT(finder.notes(), ElementsAre(HasSubstr("unsupported")));
}

TEST_F(FinderTest, WhatIsNotLookedIntoIsNamed) {
  struct Case {
    size_t offset;
    std::string_view magic;
    const char* name;
  };
  for (const Case& each :
       {Case{0, "XFSB", "XFS"}, Case{0x10040, "_BHRfS_M", "btrfs"}, Case{512, "LABELONE", "LVM"},
        Case{0, "LUKS\xba\xbe", "LUKS"}, Case{4096, "\xfc\x4e\x2b\xa9", "RAID"},
        Case{3, "NTFS    ", "NTFS"}, Case{1024, "\x10\x20\xf5\xf2", "F2FS"}}) {
    MemorySource disk(kMiB);
    std::memcpy(disk.bytes.data() + each.offset, each.magic.data(), each.magic.size());
    Finder finder(disk);
    EXPECT_FALSE(finder.find());
    EXPECT_THAT(finder.foreign(), ElementsAre(HasSubstr(each.name)));
  }
  // Also where it ends before the places that are looked at.
  for (const size_t size : {0, 1, 511, 513, 4096, 4100, 0x10040}) {
    MemorySource disk(size);
    EXPECT_THAT(Finder(disk).foreign(), IsEmpty());
  }
}

// GRUB's path may begin with a device.
TEST_F(FinderTest, ADeviceBeforeThePathIsLeftOut) {
  file("boot/grub/grub.cfg",
       "menuentry x {\n linux (hd0,gpt2)/boot/vmlinuz-1 a\n initrd ($root)/boot/initrd.img-1\n}\n");
  file("boot/vmlinuz-1", "kernel");
  file("boot/initrd.img-1", "initrd");
  MemorySource disk(file_system(4 * kMiB));
  Finder finder(disk);
  const auto found = finder.find();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->entry.kernel, "/boot/vmlinuz-1");
  EXPECT_THAT(found->entry.initrds, ElementsAre("/boot/initrd.img-1"));
}

// The library may refuse, and find nothing or something else; it must come back. (A crash is
// survived too, because it happens in a child; see the daemon's tests.)
TEST_F(FinderTest, DamagedFileSystemsAreLeftOutOrRead) {
  file("boot/grub/grub.cfg", "menuentry x {\n linux /boot/vmlinuz-1 a\n}\n");
  file("boot/vmlinuz-1", std::string(50'000, 'k'));
  const auto sound = file_system(2 * kMiB, "-t ext4 -b 1024");
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 40; ++round) {
    MemorySource disk(sound);
    // The superblock, the group descriptors and the inode tables come first.
    for (int flip = 0; flip < 8; ++flip) {
      disk.bytes[1024 + random() % 65536] ^= static_cast<std::byte>(1U << random() % 8);
    }
    try {
      Finder finder(disk);
      if (const auto found = finder.find()) (void)content(finder, found->entry.kernel);
    } catch (const base::Error&) {
      continue;
    }
  }
}

}  // namespace
}  // namespace minivmm::bootdisk
