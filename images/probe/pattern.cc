// SPDX-License-Identifier: Apache-2.0
#include "pattern.h"

namespace minivmm::probe {
namespace {

uint64_t word_at(const Options& options, uint64_t offset) {
  if (options.pattern == PatternKind::kByte) return 0x0101010101010101 * uint64_t{options.byte};
  return mix64(offset ^ mix64(options.seed));
}

Stamp stamp_at(const Options& options, uint64_t offset) {
  return {offset, options.first, static_cast<uint32_t>(options.writer),
          static_cast<uint32_t>(options.seed)};
}

void fill_text(const Options& options, uint64_t offset, uint8_t* data, uint64_t bytes) {
  for (uint64_t i = 0; i < bytes; ++i) {
    const uint64_t at = offset - options.offset + i;
    data[i] = at < options.text.size() ? static_cast<uint8_t>(options.text[at]) : 0;
  }
}

}  // namespace

void fill_pattern(const Options& options, uint64_t offset, void* data, uint64_t bytes) {
  auto* words = static_cast<uint64_t*>(data);
  if (options.pattern == PatternKind::kText) {
    fill_text(options, offset, static_cast<uint8_t*>(data), bytes);
  } else if (options.pattern == PatternKind::kStamp) {
    for (uint64_t at = 0; at < bytes; at += kSectorBytes) {
      fill_stamp(words + at / 8, stamp_at(options, offset + at));
    }
  } else {
    for (uint64_t at = 0; at < bytes; at += 8) words[at / 8] = word_at(options, offset + at);
  }
}

uint64_t check_pattern(const Options& options, uint64_t offset, const void* data, uint64_t bytes,
                       uint64_t* first) {
  const auto* got = static_cast<const uint8_t*>(data);
  alignas(8) uint8_t expected[kSectorBytes];
  uint64_t wrong = 0;
  for (uint64_t sector = 0; sector < bytes; sector += kSectorBytes) {
    fill_pattern(options, offset + sector, expected, kSectorBytes);
    for (uint64_t i = 0; i < kSectorBytes; ++i) {
      if (got[sector + i] == expected[i]) continue;
      if (wrong++ == 0) *first = offset + sector + i;
      break;
    }
  }
  return wrong;
}

}  // namespace minivmm::probe
