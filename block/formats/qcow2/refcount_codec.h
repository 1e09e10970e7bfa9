// SPDX-License-Identifier: Apache-2.0
// Entries of a refcount block, 1 to 64 bits wide. Pure. Below 8 bits, entry 0 of a byte is in its
// least significant bits; from 16 bits on, entries are big-endian.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"

namespace minivmm::block::qcow2 {

inline uint64_t get_refcount(const std::byte* block, uint64_t index, unsigned order) noexcept {
  switch (order) {
    case 3:
      return static_cast<uint8_t>(block[index]);
    case 4:
      return base::load_be<uint16_t>(block + index * 2);
    case 5:
      return base::load_be<uint32_t>(block + index * 4);
    case 6:
      return base::load_be<uint64_t>(block + index * 8);
    default: {
      const unsigned width = 1U << order;
      const uint64_t bit = index << order;
      return (static_cast<unsigned>(block[bit >> 3]) >> (bit & 7)) & ((1U << width) - 1);
    }
  }
}

// `value` fits the width.
inline void set_refcount(std::byte* block, uint64_t index, unsigned order,
                         uint64_t value) noexcept {
  switch (order) {
    case 3:
      block[index] = static_cast<std::byte>(value);
      return;
    case 4:
      base::store_be(block + index * 2, static_cast<uint16_t>(value));
      return;
    case 5:
      base::store_be(block + index * 4, static_cast<uint32_t>(value));
      return;
    case 6:
      base::store_be(block + index * 8, value);
      return;
    default: {
      const uint64_t bit = index << order;
      const unsigned shift = static_cast<unsigned>(bit & 7);
      const unsigned mask = ((1U << (1U << order)) - 1) << shift;
      const unsigned old = static_cast<unsigned>(block[bit >> 3]);
      block[bit >> 3] =
          static_cast<std::byte>((old & ~mask) | ((static_cast<unsigned>(value) << shift) & mask));
    }
  }
}

}  // namespace minivmm::block::qcow2
