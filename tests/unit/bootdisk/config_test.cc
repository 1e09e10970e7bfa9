// SPDX-License-Identifier: Apache-2.0
// What boot loaders' configurations say.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "bootdisk/grub_config.h"
#include "bootdisk/loader_entries.h"

namespace minivmm::bootdisk {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

TEST(GrubConfig, TakesTheEntriesOfAGeneratedFile) {
  const auto entries = parse_grub_config(R"(
# generated
set default="0"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
fi
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	linux	/boot/vmlinuz-6.1.0-13-amd64 root=UUID=0a1b ro console=tty0 \
	        quiet
	initrd	/boot/ucode.img /boot/initrd.img-6.1.0-13-amd64
}
submenu 'Advanced options' {
	menuentry 'recovery' { linux /boot/vmlinuz-6.1.0-13-amd64 single ; }
}
menuentry 'memory test' {
	linux16 /boot/memtest
}
menuentry 'UEFI Firmware Settings' { fwsetup }
)",
                                         {});
  ASSERT_THAT(entries, SizeIs(3));
  EXPECT_EQ(entries[0].title, "Debian GNU/Linux");
  EXPECT_EQ(entries[0].kernel, "/boot/vmlinuz-6.1.0-13-amd64");
  EXPECT_EQ(entries[0].arguments, "root=UUID=0a1b ro console=tty0 quiet");
  EXPECT_THAT(entries[0].initrds,
              ElementsAre("/boot/ucode.img", "/boot/initrd.img-6.1.0-13-amd64"));
  EXPECT_EQ(entries[1].arguments, "single");
  EXPECT_THAT(entries[1].initrds, IsEmpty());
  EXPECT_EQ(entries[2].kernel, "/boot/memtest");
}

TEST(GrubConfig, QuotesAndVariables) {
  const Variables variables = parse_grub_environment(
      "# GRUB Environment Block\nkernelopts=root=/dev/vda2 ro quiet\nname=x\n######");
  const auto entries = parse_grub_config(
      "menuentry \"a \\\"b\\\" $name\" {\n linux ($root)/vmlinuz $kernelopts dyndbg='file a +p' "
      "\"two words\" c\\ d ${name}y $none end\n}",
      variables);
  ASSERT_THAT(entries, SizeIs(1));
  EXPECT_EQ(entries[0].title, "a \"b\" x");
  EXPECT_EQ(entries[0].kernel, "()/vmlinuz");
  EXPECT_EQ(entries[0].arguments,
            "root=/dev/vda2 ro quiet dyndbg=\"file a +p\" \"two words\" \"c d\" xy end");
}

// Each of these ended in the middle of something once.
TEST(GrubConfig, CutOffTextsEnd) {
  const std::string whole = "menuentry 'a' { linux /k \"x $y ${z} \\\n w\" 'q' \\x # c\n}\n";
  for (size_t length = 0; length <= whole.size(); ++length) {
    (void)parse_grub_config(whole.substr(0, length), {{"y", " a b "}, {"z", ""}});
  }
  std::string many;
  for (int i = 0; i < 2000; ++i) many += "menuentry x { linux /k\n}\n";
  EXPECT_THAT(parse_grub_config(many, {}), SizeIs(kMaxEntries));
}

TEST(LoaderEntries, BootLoaderSpecification) {
  const auto entry = parse_loader_entry(
      "title  Fedora Linux (6.5)\nversion 6.5\nlinux /vmlinuz-6.5\n"
      "initrd /initramfs-6.5.img $tuned_initrd\noptions root=UUID=1 $extra\noptions quiet\n",
      {{"extra", "rhgb"}});
  ASSERT_TRUE(entry);
  EXPECT_EQ(entry->title, "Fedora Linux (6.5)");
  EXPECT_EQ(entry->kernel, "/vmlinuz-6.5");
  EXPECT_THAT(entry->initrds, ElementsAre("/initramfs-6.5.img"));
  EXPECT_EQ(entry->arguments, "root=UUID=1 rhgb quiet");
  EXPECT_FALSE(parse_loader_entry("title only\nefi /x.efi\n", {}));
}

TEST(LoaderEntries, ExtlinuxPutsTheDefaultFirst) {
  const auto entries = parse_extlinux(
      "DEFAULT virt\nPROMPT 0\nLABEL lts\n  KERNEL vmlinuz-lts\n  APPEND root=/dev/vda3\n"
      "LABEL menu\n MENU LABEL none\nLABEL virt\n  LINUX vmlinuz-virt\n"
      "  APPEND initrd=initramfs-virt,more root=UUID=2 quiet\n");
  ASSERT_THAT(entries, SizeIs(2));
  EXPECT_EQ(entries[0].kernel, "vmlinuz-virt");
  EXPECT_THAT(entries[0].initrds, ElementsAre("initramfs-virt", "more"));
  EXPECT_EQ(entries[0].arguments, "root=UUID=2 quiet");
  EXPECT_EQ(entries[1].arguments, "root=/dev/vda3");
}

}  // namespace
}  // namespace minivmm::bootdisk
