// SPDX-License-Identifier: Apache-2.0
// Loads and stores of memory that a guest shares with us and may change at any moment. Pure.
//
// Indices and flags of a ring are atomics with the ordering that the ring's protocol needs, also
// on a weakly ordered host. Everything else is copied out once, and only the copy is looked at.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/bytes.h"

namespace minivmm::virtio {

// `at` is 2-byte aligned.
inline uint16_t load_u16(std::byte* at, std::memory_order order) noexcept {
  // SAFETY: aligned by the caller; atomic_ref only asks for the object's storage.
  return base::le_to_host(std::atomic_ref(*reinterpret_cast<uint16_t*>(at)).load(order));
}
inline void store_u16(std::byte* at, uint16_t value, std::memory_order order) noexcept {
  // SAFETY: as above.
  std::atomic_ref(*reinterpret_cast<uint16_t*>(at)).store(base::host_to_le(value), order);
}

// Copies `length` bytes out, at any alignment.
inline void copy_from_guest(void* to, const std::byte* from, size_t length) noexcept {
  std::memcpy(to, from, length);
  // Keeps the compiler from reading `from` again in place of the copy.
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

}  // namespace minivmm::virtio
