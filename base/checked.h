// SPDX-License-Identifier: Apache-2.0
// Arithmetic on sizes and offsets that come from outside. Pure.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <optional>

namespace minivmm::base {

template <std::unsigned_integral T>
constexpr std::optional<T> checked_add(T a, T b) noexcept {
  T out;
  if (__builtin_add_overflow(a, b, &out)) return std::nullopt;
  return out;
}
template <std::unsigned_integral T>
constexpr std::optional<T> checked_mul(T a, T b) noexcept {
  T out;
  if (__builtin_mul_overflow(a, b, &out)) return std::nullopt;
  return out;
}

// True if [offset, offset + length) lies inside [0, limit), without overflow.
constexpr bool range_fits(uint64_t offset, uint64_t length, uint64_t limit) noexcept {
  return offset <= limit && length <= limit - offset;
}

// `alignment` is a power of two. align_up wraps only for values in the last block of the type.
template <std::unsigned_integral T>
constexpr T align_down(T v, T alignment) noexcept {
  return v & ~(alignment - 1);
}
template <std::unsigned_integral T>
constexpr T align_up(T v, T alignment) noexcept {
  return static_cast<T>(v + (alignment - 1)) & ~(alignment - 1);
}
template <std::unsigned_integral T>
constexpr bool is_aligned(T v, T alignment) noexcept {
  return (v & (alignment - 1)) == 0;
}
template <std::unsigned_integral T>
constexpr T div_ceil(T v, T divisor) noexcept {
  return v / divisor + (v % divisor != 0 ? 1 : 0);
}

}  // namespace minivmm::base
