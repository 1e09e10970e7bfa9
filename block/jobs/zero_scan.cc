// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/zero_scan.h"

#include <algorithm>
#include <bit>

#include "base/iovec.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace minivmm::block {
namespace {

bool zero_portable(const std::byte* data, size_t length) noexcept {
  return base::is_zero({data, length});
}

#if defined(__x86_64__)

// Data mostly shows in the first bytes, so the loops end early; what is zero is read to its end.
bool zero_sse2(const std::byte* data, size_t length) noexcept {
  const __m128i none = _mm_setzero_si128();
  while (length >= 64) {
    // SAFETY: unaligned loads of bytes that are inside the buffer.
    const auto* at = reinterpret_cast<const __m128i*>(data);
    const __m128i low = _mm_or_si128(_mm_loadu_si128(at), _mm_loadu_si128(at + 1));
    const __m128i high = _mm_or_si128(_mm_loadu_si128(at + 2), _mm_loadu_si128(at + 3));
    const __m128i equal = _mm_cmpeq_epi8(_mm_or_si128(low, high), none);
    if (_mm_movemask_epi8(equal) != 0xffff) return false;
    data += 64;
    length -= 64;
  }
  return zero_portable(data, length);
}

__attribute__((target("avx2"))) bool zero_avx2(const std::byte* data, size_t length) noexcept {
  while (length >= 128) {
    // SAFETY: as above.
    const auto* at = reinterpret_cast<const __m256i*>(data);
    const __m256i low = _mm256_or_si256(_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1));
    const __m256i high = _mm256_or_si256(_mm256_loadu_si256(at + 2), _mm256_loadu_si256(at + 3));
    const __m256i any = _mm256_or_si256(low, high);
    if (_mm256_testz_si256(any, any) == 0) return false;
    data += 128;
    length -= 128;
  }
  return zero_sse2(data, length);
}

#endif

// The last one is the best.
constexpr ZeroTest kTests[] = {
    &zero_portable,
#if defined(__x86_64__)
    &zero_sse2,
    &zero_avx2,
#endif
};

size_t count_tests() noexcept {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") ? 3 : 2;
#else
  return 1;
#endif
}

}  // namespace

std::span<const ZeroTest> zero_tests() noexcept {
  static const size_t count = count_tests();
  return {kTests, count};
}

bool all_zero(std::span<const std::byte> bytes) noexcept {
  return zero_tests().back()(bytes.data(), bytes.size());
}

ZeroGrain::ZeroGrain(uint64_t bytes) noexcept
    : block_(bytes == 0 ? 1 : std::bit_floor(static_cast<size_t>(bytes))),
      least_(static_cast<size_t>(bytes)) {}

ContentRun first_run(std::span<const std::byte> bytes, const ZeroGrain& grain) noexcept {
  if (!grain.enabled()) return {bytes.size(), false};
  const ZeroTest is_zero = zero_tests().back();
  size_t zeroes = 0;  // of the run that ends at `at`
  size_t at = 0;
  while (at < bytes.size()) {
    const size_t length = std::min(grain.block(), bytes.size() - at);
    const bool zero = is_zero(bytes.data() + at, length);
    // A run that is long enough ends with the first block of data after it, or begins after the
    // data before it.
    if (!zero && zeroes == at && zeroes >= grain.least()) return {zeroes, true};
    zeroes = zero ? zeroes + length : 0;
    at += length;
    if (zeroes >= grain.least() && zeroes < at) return {at - zeroes, false};
  }
  // What is short only because the buffer ends counts by the whole: the caller's pieces are large.
  return {bytes.size(), zeroes == bytes.size()};
}

}  // namespace minivmm::block
