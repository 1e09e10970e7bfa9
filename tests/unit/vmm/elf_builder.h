// SPDX-License-Identifier: Apache-2.0
// Makes ELF kernels in memory for the tests: good ones, and ones that a test then spoils.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include <elf.h>

namespace minivmm::vmm::test {

// One segment with `code` at `address`, entered there by PVH if `with_note`.
//   0x000 header, 0x040 two program headers, 0x0b0 note, 0x100 code
struct TestElf {
  static constexpr size_t kNoteOffset = 0xb0;
  static constexpr size_t kCodeOffset = 0x100;

  Elf64_Ehdr header{};
  Elf64_Phdr load{};
  Elf64_Phdr note{};
  std::vector<uint8_t> note_bytes;
  std::vector<uint8_t> code;

  explicit TestElf(std::vector<uint8_t> machine_code, uint64_t address = 0x200000,
                   bool with_note = true)
      : code(std::move(machine_code)) {
    std::memcpy(header.e_ident, ELFMAG, SELFMAG);
    header.e_ident[EI_CLASS] = ELFCLASS64;
    header.e_ident[EI_DATA] = ELFDATA2LSB;
    header.e_ident[EI_VERSION] = EV_CURRENT;
    header.e_type = ET_EXEC;
    header.e_machine = EM_X86_64;
    header.e_version = EV_CURRENT;
    header.e_entry = address;
    header.e_phoff = sizeof header;
    header.e_ehsize = sizeof header;
    header.e_phentsize = sizeof(Elf64_Phdr);
    header.e_phnum = with_note ? 2 : 1;
    load.p_type = PT_LOAD;
    load.p_offset = kCodeOffset;
    load.p_paddr = load.p_vaddr = address;
    load.p_filesz = load.p_memsz = code.size();
    note.p_type = PT_NOTE;
    note.p_offset = kNoteOffset;
    note_bytes = {4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, 'X', 'e', 'n', 0};
    for (int i = 0; i < 8; ++i) note_bytes.push_back(static_cast<uint8_t>(address >> (8 * i)));
    note.p_filesz = note_bytes.size();
  }

  std::vector<std::byte> bytes() const {
    std::vector<std::byte> out(kCodeOffset + code.size());
    std::memcpy(out.data(), &header, sizeof header);
    std::memcpy(out.data() + sizeof header, &load, sizeof load);
    std::memcpy(out.data() + sizeof header + sizeof load, &note, sizeof note);
    std::memcpy(out.data() + kNoteOffset, note_bytes.data(), note_bytes.size());
    std::memcpy(out.data() + kCodeOffset, code.data(), code.size());
    return out;
  }
};

}  // namespace minivmm::vmm::test
