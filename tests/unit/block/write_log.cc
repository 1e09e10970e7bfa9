// SPDX-License-Identifier: Apache-2.0
#include "write_log.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "base/bytes.h"
#include "block/filters/log_writes.h"

namespace minivmm::block {

using log_writes::kSector;

WriteLog::WriteLog(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {
  const auto word = [&](uint64_t at) {
    if (at + 8 > bytes_.size()) throw std::runtime_error("the log ends early");
    return base::load_le<uint64_t>(bytes_.data() + at);
  };
  if (word(0) != log_writes::kMagic || word(8) != log_writes::kVersion ||
      (word(24) & 0xffffffff) != kSector) {
    throw std::runtime_error("no log of ours");
  }
  uint64_t at = kSector;
  for (uint64_t left = word(16); left > 0; --left) {
    Entry entry{at, word(at) * kSector, word(at + 8) * kSector, word(at + 16), at + kSector};
    const uint64_t data = word(at + 24);
    if (data != 0 && data != entry.length) throw std::runtime_error("a part of a sector is logged");
    at = entry.data + data;
    if (at > bytes_.size()) throw std::runtime_error("the log ends within an entry");
    entries_.push_back(entry);
  }
}

void WriteLog::apply(const Entry& entry, uint64_t from, uint64_t to,
                     std::vector<std::byte>& out) const {
  if (from >= to) return;
  if ((entry.flags & log_writes::kDiscard) != 0) {  // a hole does not make the file longer
    to = std::min(to, out.size() > entry.offset ? out.size() - entry.offset : 0);
    if (from < to) std::memset(out.data() + entry.offset + from, 0, to - from);
    return;
  }
  if (out.size() < entry.offset + to) out.resize(entry.offset + to);
  std::memcpy(out.data() + entry.offset + from, bytes_.data() + entry.data + from, to - from);
}

std::vector<std::byte> WriteLog::after_power_loss(std::vector<std::byte> start, size_t cut,
                                                  std::mt19937_64& random) const {
  size_t sure = 0;  // entries before this one are on the disk
  for (size_t i = 0; i < cut; ++i) {
    if ((entries_[i].flags & log_writes::kFlush) != 0) sure = i;
  }
  // Nothing of the rest, everything, or entries by chance with some of them torn.
  const unsigned luck = static_cast<unsigned>(random() % 6);
  for (size_t i = 0; i < cut; ++i) {
    const Entry& entry = entries_[i];
    if (entry.length == 0) continue;
    if (i < sure || (entry.flags & log_writes::kFua) != 0 || luck == 1) {
      apply(entry, 0, entry.length, start);
      continue;
    }
    if (luck == 0 || random() % 2 == 0) continue;
    if (random() % 3 != 0) {
      apply(entry, 0, entry.length, start);
      continue;
    }
    // A disk writes sectors whole, but in any order.
    for (uint64_t at = 0; at < entry.length; at += kSector) {
      if (random() % 2 == 0) apply(entry, at, at + kSector, start);
    }
  }
  return start;
}

}  // namespace minivmm::block
