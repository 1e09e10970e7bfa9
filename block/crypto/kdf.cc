// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/kdf.h"

#include <algorithm>
#include <limits>

#include <time.h>

#include "base/checked.h"
#include "block/crypto/gnutls.h"

namespace minivmm::block::crypto {
namespace {

// SAFETY: GnuTLS takes unsigned char pointers without const and does not write through them.
gnutls_datum_t datum(std::span<const std::byte> bytes) noexcept {
  static const std::byte nothing{};
  const std::byte* data = bytes.empty() ? &nothing : bytes.data();
  return {reinterpret_cast<unsigned char*>(const_cast<std::byte*>(data)),
          static_cast<unsigned>(bytes.size())};
}

double thread_seconds() noexcept {
  timespec now{};
  if (::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) != 0) ::clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

}  // namespace

base::Pool& key_pool() {
  static base::Pool pool("keys", 1);
  return pool;
}

void pbkdf2(Hash hash, std::span<const std::byte> password, std::span<const std::byte> salt,
            uint32_t iterations, std::span<std::byte> out) {
  const gnutls_datum_t key = datum(password);
  const gnutls_datum_t salting = datum(salt);
  require_hash(hash, gnutls().pbkdf2(static_cast<gnutls_mac_algorithm_t>(gnutls_mac_of(hash)), &key,
                                     &salting, iterations, out.data(), out.size()));
}

KdfSpeed::KdfSpeed(Hash hash, Precision precision) : digest_size_(digest_size(hash)) {
  constexpr std::byte kSample[32] = {std::byte{1}, std::byte{2}, std::byte{3}};
  std::byte out[kMaxDigest];
  const double wanted = precision == Precision::kFine ? 0.015 : 0.001;
  pbkdf2(hash, kSample, kSample, 1, {out, digest_size_});  // what only the first call does
  // Twice as many each time, until the clock has something to measure: this bounds the time even
  // where the clock stands still.
  for (uint32_t iterations = 1024; iterations < (1U << 22); iterations *= 2) {
    const double before = thread_seconds();
    pbkdf2(hash, kSample, kSample, iterations, {out, digest_size_});
    const double taken = thread_seconds() - before;
    seconds_ = taken / iterations;
    if (taken >= wanted) break;
  }
  if (seconds_ <= 0) seconds_ = 1e-6;
}

double KdfSpeed::rounds(size_t size) const noexcept {
  return static_cast<double>(base::div_ceil<size_t>(std::max<size_t>(size, 1), digest_size_));
}

std::chrono::duration<double> KdfSpeed::time_of(uint32_t iterations, size_t size) const noexcept {
  return std::chrono::duration<double>(seconds_ * iterations * rounds(size));
}

uint32_t KdfSpeed::iterations_in(std::chrono::milliseconds time, size_t size) const noexcept {
  const double fitting = static_cast<double>(time.count()) / 1000 / (seconds_ * rounds(size));
  constexpr double kMost = std::numeric_limits<uint32_t>::max();
  return static_cast<uint32_t>(std::clamp<double>(fitting, kMinIterations, kMost));
}

void fill_random(std::span<std::byte> out) {
  require_success(gnutls().rnd(GNUTLS_RND_KEY, out.data(), out.size()), "random numbers");
}

}  // namespace minivmm::block::crypto
