// SPDX-License-Identifier: Apache-2.0
#include "vmm/elf_image.h"

#include <errno.h>

#include <algorithm>
#include <array>
#include <cstring>

#include <elf.h>
#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"

namespace minivmm::vmm {
namespace {

constexpr uint16_t kMaxProgramHeaders = 64;
constexpr uint64_t kMaxNoteBytes = 65536;
constexpr uint32_t kXenNotePhys32Entry = 18;

[[noreturn]] void reject(const ImageReader& image, const std::string& why) {
  throw base::Error(EINVAL, fmt::format("{}: not a usable ELF kernel: {}", image.name(), why));
}

template <typename T>
T read_struct(const ImageReader& image, uint64_t offset, const char* what) {
  T out;
  image.read(offset, std::as_writable_bytes(std::span(&out, 1)), what);
  return out;
}

void check_header(const ImageReader& image, const Elf64_Ehdr& header) {
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) reject(image, "no ELF magic");
  if (header.e_ident[EI_CLASS] != ELFCLASS64) reject(image, "not 64-bit");
  if (header.e_ident[EI_DATA] != ELFDATA2LSB) reject(image, "not little-endian");
  if (header.e_machine != EM_X86_64) {
    reject(image, fmt::format("machine {} is not x86-64", header.e_machine));
  }
  if (header.e_type != ET_EXEC) {
    reject(image, fmt::format("type {} is not an executable with fixed addresses", header.e_type));
  }
  if (header.e_phentsize != sizeof(Elf64_Phdr)) {
    reject(image, fmt::format("program headers of {} bytes", header.e_phentsize));
  }
  if (header.e_phnum == 0 || header.e_phnum > kMaxProgramHeaders) {
    reject(image, fmt::format("{} program headers", header.e_phnum));
  }
}

ElfSegment load_segment(const ImageReader& image, const Elf64_Phdr& header) {
  if (header.p_filesz > header.p_memsz) {
    reject(image, fmt::format("segment at {:#x} has more bytes in the file than in memory",
                              header.p_paddr));
  }
  if (!base::range_fits(header.p_offset, header.p_filesz, image.size())) {
    reject(image, fmt::format("segment at {:#x} lies outside the file ({} bytes)", header.p_paddr,
                              image.size()));
  }
  if (!base::checked_add(header.p_paddr, header.p_memsz)) {
    reject(image, fmt::format("segment at {:#x} wraps around", header.p_paddr));
  }
  return {header.p_offset, header.p_filesz, header.p_paddr, header.p_memsz};
}

// Notes are {namesz, descsz, type, name, desc}, each part padded to 4 bytes.
std::optional<uint32_t> pvh_entry_in_notes(const ImageReader& image, const Elf64_Phdr& header) {
  if (header.p_filesz > kMaxNoteBytes) {
    reject(image, fmt::format("notes of {} bytes", header.p_filesz));
  }
  std::vector<std::byte> notes(header.p_filesz);
  image.read(header.p_offset, notes, "ELF notes");
  uint64_t at = 0;
  while (base::range_fits(at, sizeof(Elf64_Nhdr), notes.size())) {
    Elf64_Nhdr note;
    std::memcpy(&note, notes.data() + at, sizeof note);
    const uint64_t name_at = at + sizeof note;
    const uint64_t desc_at = name_at + base::align_up(uint64_t{note.n_namesz}, uint64_t{4});
    if (!base::range_fits(name_at, note.n_namesz, notes.size()) ||
        !base::range_fits(desc_at, note.n_descsz, notes.size())) {
      reject(image, "a note runs over the end of its segment");
    }
    if (note.n_type == kXenNotePhys32Entry && note.n_namesz == 4 &&
        std::memcmp(notes.data() + name_at, "Xen", 4) == 0) {
      if (note.n_descsz != 4 && note.n_descsz != 8) {
        reject(image, fmt::format("PVH entry note of {} bytes", note.n_descsz));
      }
      uint64_t entry = 0;
      std::memcpy(&entry, notes.data() + desc_at, note.n_descsz);
      if (entry > UINT32_MAX) reject(image, fmt::format("PVH entry {:#x} above 4 GiB", entry));
      return static_cast<uint32_t>(entry);
    }
    at = desc_at + base::align_up(uint64_t{note.n_descsz}, uint64_t{4});
  }
  return std::nullopt;
}

void finish(const ImageReader& image, ElfImage& out) {
  if (out.segments.empty()) reject(image, "nothing to load");
  std::sort(out.segments.begin(), out.segments.end(),
            [](const ElfSegment& a, const ElfSegment& b) { return a.address < b.address; });
  out.lowest = out.segments.front().address;
  for (const auto& segment : out.segments) {
    if (segment.address < out.end) {
      reject(image, fmt::format("segments overlap at {:#x}", segment.address));
    }
    out.end = segment.address + segment.memory_size;
  }
  const auto loaded = [&](uint64_t address) {
    return std::any_of(out.segments.begin(), out.segments.end(), [&](const ElfSegment& s) {
      return address >= s.address && address - s.address < s.file_size;
    });
  };
  if (out.pvh_entry && !loaded(*out.pvh_entry)) {
    reject(image, fmt::format("PVH entry {:#x} is not in a loaded segment", *out.pvh_entry));
  }
  if (!out.pvh_entry && !loaded(out.entry)) {
    reject(image, fmt::format("entry {:#x} is not in a loaded segment", out.entry));
  }
}

}  // namespace

bool looks_like_elf(const ImageReader& image) {
  std::array<std::byte, SELFMAG> magic{};
  if (image.size() < magic.size()) return false;
  image.read(0, magic, "magic");
  return std::memcmp(magic.data(), ELFMAG, SELFMAG) == 0;
}

ElfImage parse_elf(const ImageReader& image) {
  const auto header = read_struct<Elf64_Ehdr>(image, 0, "ELF header");
  check_header(image, header);
  ElfImage out;
  out.entry = header.e_entry;
  for (uint16_t i = 0; i < header.e_phnum; ++i) {
    const auto offset = base::checked_add(header.e_phoff, i * uint64_t{sizeof(Elf64_Phdr)});
    if (!offset) reject(image, "program headers wrap around");
    const auto program = read_struct<Elf64_Phdr>(image, *offset, "program header");
    if (program.p_type == PT_LOAD && program.p_memsz != 0) {
      out.segments.push_back(load_segment(image, program));
    } else if (program.p_type == PT_NOTE && !out.pvh_entry) {
      out.pvh_entry = pvh_entry_in_notes(image, program);
    }
  }
  finish(image, out);
  return out;
}

}  // namespace minivmm::vmm
