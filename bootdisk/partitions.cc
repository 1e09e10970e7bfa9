// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/partitions.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include <fmt/core.h>

#include "base/bytes.h"

namespace minivmm::bootdisk {

using base::load_be;
using base::load_le;

namespace {

constexpr uint64_t kSector = 512;
constexpr uint32_t kMaxGptEntries = 256;
constexpr unsigned kMaxLogical = 64;
constexpr uint8_t kProtective = 0xee;

using Sector = std::array<std::byte, kSector>;

bool inside(const Volume& volume, uint64_t disk) {
  return volume.length > 0 && volume.offset < disk && volume.length <= disk - volume.offset;
}

// --- MBR ---

struct MbrEntry {
  uint8_t type;
  uint64_t first;    // sectors
  uint64_t sectors;  // 0: unused
};

MbrEntry mbr_entry(const Sector& sector, unsigned index) {
  const std::byte* const at = sector.data() + 446 + 16 * static_cast<size_t>(index);
  return {static_cast<uint8_t>(at[4]), load_le<uint32_t>(at + 8), load_le<uint32_t>(at + 12)};
}

bool has_signature(const Sector& sector) { return load_le<uint16_t>(&sector[510]) == 0xaa55; }

bool is_extended(uint8_t type) { return type == 0x05 || type == 0x0f || type == 0x85; }

class MbrReader {
 public:
  MbrReader(ByteSource& disk, const Sector& first) : disk_(disk), first_(first) {}

  std::vector<Volume> volumes() {
    for (unsigned i = 0; i < 4; ++i) {
      const MbrEntry entry = mbr_entry(first_, i);
      if (is_extended(entry.type)) {
        add_logical(entry.first);
      } else {
        add(i + 1, entry.type, entry.first, entry.sectors);
      }
    }
    std::stable_sort(out_.begin(), out_.end(),
                     [](const Volume& a, const Volume& b) { return a.number < b.number; });
    return std::move(out_);
  }

 private:
  void add(unsigned number, uint8_t type, uint64_t first, uint64_t sectors) {
    if (type == 0 || sectors == 0) return;
    Volume volume{number, first * kSector, sectors * kSector,
                  fmt::format("{:08x}-{:02x}", load_le<uint32_t>(&first_[440]), number)};
    if (inside(volume, disk_.size())) out_.push_back(std::move(volume));
  }

  // A chain of tables, each with one partition and the place of the next. Bounded, because a
  // damaged chain may lead back.
  void add_logical(uint64_t base) {
    uint64_t table = base;
    for (unsigned i = 0; i < kMaxLogical; ++i) {
      Sector sector;
      if (table > disk_.size() / kSector - 1) return;
      disk_.read(table * kSector, sector);
      if (!has_signature(sector)) return;
      const MbrEntry entry = mbr_entry(sector, 0);
      const MbrEntry next = mbr_entry(sector, 1);
      add(5 + i, entry.type, table + entry.first, entry.sectors);
      if (!is_extended(next.type) || next.first == 0) return;
      table = base + next.first;
    }
  }

  ByteSource& disk_;
  const Sector& first_;
  std::vector<Volume> out_;
};

// --- GPT ---

std::string guid_text(const std::byte* at) {
  return fmt::format("{:08x}-{:04x}-{:04x}-{:04x}-{:04x}{:08x}", load_le<uint32_t>(at),
                     load_le<uint16_t>(at + 4), load_le<uint16_t>(at + 6),
                     load_be<uint16_t>(at + 8), load_be<uint16_t>(at + 10),
                     load_be<uint32_t>(at + 12));
}

// Nullopt: there is no GPT with blocks of this size.
std::optional<std::vector<Volume>> gpt_volumes(ByteSource& disk, uint64_t block) {
  if (disk.size() < 3 * block) return std::nullopt;
  std::array<std::byte, 92> header;
  disk.read(block, header);
  if (std::memcmp(header.data(), "EFI PART", 8) != 0) return std::nullopt;
  const auto table = load_le<uint64_t>(&header[72]);
  const uint32_t count = std::min(load_le<uint32_t>(&header[80]), kMaxGptEntries);
  const auto entry_size = load_le<uint32_t>(&header[84]);
  std::vector<Volume> out;
  if (entry_size < 128 || entry_size > 4096 || table > disk.size() / block) return out;
  for (uint32_t i = 0; i < count; ++i) {
    std::array<std::byte, 128> entry;
    const uint64_t at = table * block + uint64_t{i} * entry_size;
    if (at > disk.size() - entry.size()) break;
    disk.read(at, entry);
    const auto first = load_le<uint64_t>(&entry[32]);
    const auto last = load_le<uint64_t>(&entry[40]);
    const bool used = std::any_of(entry.begin(), entry.begin() + 16,
                                  [](std::byte b) { return b != std::byte{0}; });
    if (!used || last < first || last >= disk.size() / block) continue;
    out.push_back({i + 1, first * block, (last - first + 1) * block, guid_text(&entry[16])});
  }
  return out;
}

}  // namespace

std::vector<Volume> find_volumes(ByteSource& disk) {
  const Volume whole{0, 0, disk.size(), {}};
  Sector first;
  if (disk.size() < 2 * kSector) return {whole};
  disk.read(0, first);
  const bool mbr = has_signature(first);
  const bool protective = mbr && mbr_entry(first, 0).type == kProtective;
  if (!mbr || protective) {
    for (const uint64_t block : {kSector, 8 * kSector}) {
      if (auto volumes = gpt_volumes(disk, block)) return std::move(*volumes);
    }
  }
  if (mbr && !protective) {
    auto volumes = MbrReader(disk, first).volumes();
    // A boot sector in front of a file system looks like a table without entries.
    if (!volumes.empty()) return volumes;
  }
  return {whole};
}

}  // namespace minivmm::bootdisk
