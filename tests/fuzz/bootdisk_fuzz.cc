// SPDX-License-Identifier: Apache-2.0
// What a hostile disk says of its partitions and its boot entries. Found by it: crashes, sanitizer
// reports, loops, volumes that are not inside the disk, entries without a kernel or without end.
//
// The first byte chooses (modulo 5): the partition table of a disk, whose bytes are the rest;
// grub.cfg behind an environment block, which ends at the first byte of zero; an entry of
// loader/entries behind the same; extlinux.conf; a text to expand, behind the same.
#include <string>
#include <string_view>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <vector>

#include "base/error.h"
#include "bootdisk/byte_source.h"
#include "bootdisk/grub_config.h"
#include "bootdisk/loader_entries.h"
#include "bootdisk/partitions.h"

namespace minivmm::bootdisk {
namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// A disk of 1 MiB at least, whose last bytes are the input's last again: GPT has a copy there.
class Disk final : public ByteSource {
 public:
  explicit Disk(std::span<const std::byte> bytes) : bytes_(bytes) {}

  uint64_t size() const noexcept override { return std::max<uint64_t>(kLeast, bytes_.size()); }
  void read(uint64_t offset, std::span<std::byte> out) override {
    if (offset > size() || out.size() > size() - offset) throw base::Error(EINVAL, "past the end");
    std::fill(out.begin(), out.end(), std::byte{0});
    put(offset, out, 0);
    if (bytes_.size() < kLeast / 2) put(offset, out, size() - bytes_.size());
  }

 private:
  static constexpr uint64_t kLeast = 1 << 20;

  // What of the input lies in [offset, offset + out.size()) when it begins at `at`.
  void put(uint64_t offset, std::span<std::byte> out, uint64_t at) const {
    const uint64_t begin = std::max(offset, at);
    const uint64_t end = std::min(offset + out.size(), at + bytes_.size());
    if (begin >= end) return;
    const auto piece = bytes_.subspan(begin - at, end - begin);
    std::copy(piece.begin(), piece.end(),
              out.begin() + static_cast<std::ptrdiff_t>(begin - offset));
  }

  std::span<const std::byte> bytes_;
};

void check_entry(const BootEntry& entry) {
  if (entry.kernel.empty()) fail("an entry without a kernel");
}

void partitions(std::span<const std::byte> bytes) {
  Disk disk(bytes);
  try {
    for (const Volume& volume : find_volumes(disk)) {
      if (volume.offset > disk.size() || volume.length > disk.size() - volume.offset) {
        fail("a volume outside the disk");
      }
    }
  } catch (const base::Error&) {
    fail("a read past the end of the disk");
  }
}

void texts(unsigned kind, std::string_view text) {
  Variables variables;
  if (kind != 3) {
    const size_t end = std::min(text.find('\0'), text.size());
    variables = parse_grub_environment(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  if (kind == 1) {
    const std::vector<BootEntry> entries = parse_grub_config(text, variables);
    if (entries.size() > kMaxEntries) fail("too many entries");
    for (const BootEntry& entry : entries) check_entry(entry);
  } else if (kind == 2) {
    const auto entry = parse_loader_entry(text, variables);
    if (entry) check_entry(*entry);
  } else if (kind == 3) {
    for (const BootEntry& entry : parse_extlinux(text)) check_entry(entry);
  } else {
    (void)expand(text, variables);
  }
}

}  // namespace
}  // namespace minivmm::bootdisk

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::span<const uint8_t> rest(data + 1, size - 1);
  const unsigned kind = data[0] % 5U;
  if (kind == 0) {
    minivmm::bootdisk::partitions(std::as_bytes(rest));
  } else {
    // SAFETY: bytes as characters.
    minivmm::bootdisk::texts(kind, {reinterpret_cast<const char*>(rest.data()), rest.size()});
  }
  return 0;
}
