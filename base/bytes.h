// SPDX-License-Identifier: Apache-2.0
// Big- and little-endian integers in byte buffers, at any alignment. Pure; never reads past the
// span (an assertion in the caller's hands: sizes are checked before decoding).
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace minivmm::base {

template <std::unsigned_integral T>
constexpr T byte_swap(T v) noexcept {
  if constexpr (sizeof(T) == 1) {
    return v;
  } else if constexpr (sizeof(T) == 2) {
    return static_cast<T>(__builtin_bswap16(v));
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_bswap32(v);
  } else {
    return __builtin_bswap64(v);
  }
}

template <std::unsigned_integral T>
constexpr T be_to_host(T v) noexcept {
  return std::endian::native == std::endian::big ? v : byte_swap(v);
}
template <std::unsigned_integral T>
constexpr T host_to_be(T v) noexcept {
  return be_to_host(v);
}
template <std::unsigned_integral T>
constexpr T le_to_host(T v) noexcept {
  return std::endian::native == std::endian::little ? v : byte_swap(v);
}
template <std::unsigned_integral T>
constexpr T host_to_le(T v) noexcept {
  return le_to_host(v);
}

template <std::unsigned_integral T>
T load_be(const void* p) noexcept {
  T v;
  std::memcpy(&v, p, sizeof v);
  return be_to_host(v);
}
template <std::unsigned_integral T>
T load_le(const void* p) noexcept {
  T v;
  std::memcpy(&v, p, sizeof v);
  return le_to_host(v);
}
template <std::unsigned_integral T>
void store_be(void* p, T v) noexcept {
  v = host_to_be(v);
  std::memcpy(p, &v, sizeof v);
}
template <std::unsigned_integral T>
void store_le(void* p, T v) noexcept {
  v = host_to_le(v);
  std::memcpy(p, &v, sizeof v);
}

}  // namespace minivmm::base
