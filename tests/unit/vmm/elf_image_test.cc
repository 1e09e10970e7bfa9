// SPDX-License-Identifier: Apache-2.0
#include "vmm/elf_image.h"

#include <functional>
#include <random>

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/unit/vmm/elf_builder.h"

namespace minivmm::vmm {
namespace {

using test::TestElf;

std::string error_of(const std::vector<std::byte>& bytes) {
  try {
    (void)parse_elf(SpanReader("kernel", bytes));
  } catch (const base::Error& error) {
    EXPECT_EQ(error.err(), EINVAL);
    return error.what();
  }
  return {};
}

std::string error_after(const std::function<void(TestElf&)>& spoil) {
  TestElf elf({0xf4, 0xf4});
  spoil(elf);
  return error_of(elf.bytes());
}

TEST(ElfImage, ReadsSegmentsAndThePvhEntry) {
  TestElf elf({0xf4, 0xf4, 0xf4});
  elf.load.p_memsz = 0x5000;
  const auto bytes = elf.bytes();
  const ElfImage image = parse_elf(SpanReader("kernel", bytes));
  ASSERT_EQ(image.segments.size(), 1u);
  EXPECT_EQ(image.segments[0].file_offset, TestElf::kCodeOffset);
  EXPECT_EQ(image.segments[0].file_size, 3u);
  EXPECT_EQ(image.segments[0].memory_size, 0x5000u);
  EXPECT_EQ(image.lowest, 0x200000u);
  EXPECT_EQ(image.end, 0x205000u);
  ASSERT_TRUE(image.pvh_entry);
  EXPECT_EQ(*image.pvh_entry, 0x200000u);
}

TEST(ElfImage, TakesAKernelWithoutANoteByItsEntry) {
  const auto bytes = TestElf({0xf4}, 0x1000000, false).bytes();
  const ElfImage image = parse_elf(SpanReader("kernel", bytes));
  EXPECT_FALSE(image.pvh_entry);
  EXPECT_EQ(image.entry, 0x1000000u);
}

TEST(ElfImage, SkipsNotesOfOthers) {
  TestElf elf({0xf4});
  std::vector<uint8_t> foreign = {4,   0,   0,   0, 5, 0, 0, 0, 18, 0, 0, 0,
                                  'G', 'N', 'U', 0, 1, 2, 3, 4, 5,  0, 0, 0};
  foreign.insert(foreign.end(), elf.note_bytes.begin(), elf.note_bytes.end());
  elf.note_bytes = foreign;
  elf.note.p_filesz = foreign.size();
  const auto bytes = elf.bytes();
  EXPECT_EQ(parse_elf(SpanReader("kernel", bytes)).pvh_entry, 0x200000u);
}

// Each of these once crashed or mis-loaded some loader. The text must say which one it is.
TEST(ElfImage, SaysWhatIsWrong) {
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos && text.find("kernel") != std::string::npos;
  };
  const auto check = [&](const char* part, const std::function<void(TestElf&)>& spoil) {
    const std::string text = error_after(spoil);
    EXPECT_TRUE(contains(text, part)) << "wanted: " << part << ", got: " << text;
  };
  check("magic", [](TestElf& e) { e.header.e_ident[0] = 0; });
  check("64-bit", [](TestElf& e) { e.header.e_ident[EI_CLASS] = ELFCLASS32; });
  check("little-endian", [](TestElf& e) { e.header.e_ident[EI_DATA] = ELFDATA2MSB; });
  check("machine", [](TestElf& e) { e.header.e_machine = EM_AARCH64; });
  check("fixed addresses", [](TestElf& e) { e.header.e_type = ET_DYN; });
  check("program headers of", [](TestElf& e) { e.header.e_phentsize = 55; });
  check("0 program headers", [](TestElf& e) { e.header.e_phnum = 0; });
  check("65535 program headers", [](TestElf& e) { e.header.e_phnum = 0xffff; });
  check("truncated", [](TestElf& e) { e.header.e_phoff = ~uint64_t{0} - 8; });
  check("truncated", [](TestElf& e) { e.header.e_phoff = 0x10000; });
  check("more bytes in the file", [](TestElf& e) { e.load.p_memsz = 1; });
  check("outside the file", [](TestElf& e) { e.load.p_offset = 0x1000; });
  check("outside the file", [](TestElf& e) { e.load.p_offset = ~uint64_t{0}; });
  check("wraps", [](TestElf& e) {
    e.load.p_paddr = ~uint64_t{0} - 1;
    e.load.p_memsz = 0x1000;
  });
  check("nothing to load", [](TestElf& e) { e.load.p_type = PT_NULL; });
  check("PVH entry", [](TestElf& e) { e.note_bytes[16 + 2] = 0x30; });
  check("above 4 GiB", [](TestElf& e) { e.note_bytes[16 + 4] = 1; });
  check("runs over the end", [](TestElf& e) { e.note_bytes[4] = 0xff; });
  check("runs over the end", [](TestElf& e) { e.note_bytes[3] = 0xff; });
  check("PVH entry note of", [](TestElf& e) { e.note_bytes[4] = 2; });
  check("notes of", [](TestElf& e) { e.note.p_filesz = 1 << 20; });
  check("overlap", [](TestElf& e) {
    e.note = e.load;
    e.note.p_paddr += 1;
  });
  check("entry 0x300000", [](TestElf& e) {
    e.header.e_phnum = 1;
    e.header.e_entry = 0x300000;
  });
}

TEST(ElfImage, TruncationAtEveryLengthIsAnError) {
  const auto whole = TestElf({0xf4, 0xf4, 0xf4}).bytes();
  for (size_t length = 0; length < whole.size(); ++length) {
    const std::vector<std::byte> part(whole.begin(), whole.begin() + static_cast<long>(length));
    EXPECT_FALSE(error_of(part).empty()) << length;
  }
}

// Whatever the bytes, parsing ends with a value or an Error. Under the sanitizers this also finds
// reads outside the image.
TEST(ElfImage, SurvivesRandomDamage) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto whole = TestElf({0xf4, 0xf4, 0xf4}).bytes();
  for (int i = 0; i < 20000; ++i) {
    auto bytes = whole;
    for (unsigned n = random() % 4 + 1; n > 0; --n) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    try {
      const ElfImage image = parse_elf(SpanReader("kernel", bytes));
      for (const auto& segment : image.segments) {
        ASSERT_LE(segment.file_offset + segment.file_size, bytes.size());
        ASSERT_LE(segment.file_size, segment.memory_size);
      }
    } catch (const base::Error&) {
    }
  }
}

}  // namespace
}  // namespace minivmm::vmm
