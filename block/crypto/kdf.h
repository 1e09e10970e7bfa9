// SPDX-License-Identifier: Apache-2.0
// Keys from passwords (PBKDF2), what that costs on this machine, and random bytes. All of it is for
// a thread's stack, not a fiber's: key_pool() is for that.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/pool.h"
#include "block/crypto/hash.h"

namespace minivmm::block::crypto {

// QEMU's bound: fewer iterations protect nothing.
inline constexpr uint32_t kMinIterations = 1000;

// Where keys are derived. A pool of its own, with one thread: a derivation takes seconds, and the
// work pool encrypts the data of live disks.
base::Pool& key_pool();

// Fills `out`. Takes as long as `iterations` ask: bounded by the caller (KdfSpeed).
void pbkdf2(Hash hash, std::span<const std::byte> password, std::span<const std::byte> salt,
            uint32_t iterations, std::span<std::byte> out);

// How fast this thread computes PBKDF2 with a hash, in processor time; measuring takes some
// milliseconds of it.
class KdfSpeed {
 public:
  enum class Precision { kRough, kFine };  // about 2 ms, about 30 ms
  explicit KdfSpeed(Hash hash, Precision precision);

  // Of deriving `size` bytes.
  std::chrono::duration<double> time_of(uint32_t iterations, size_t size) const noexcept;
  // As many as fit into `time`, but at least kMinIterations.
  uint32_t iterations_in(std::chrono::milliseconds time, size_t size) const noexcept;

 private:
  double rounds(size_t size) const noexcept;

  const size_t digest_size_;
  double seconds_ = 0;  // of one iteration that makes one digest
};

void fill_random(std::span<std::byte> out);

}  // namespace minivmm::block::crypto
