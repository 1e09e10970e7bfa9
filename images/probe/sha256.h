// SPDX-License-Identifier: Apache-2.0
// SHA-256 (FIPS 180-4), so that what the guest read can be compared with sha256sum on the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minivmm::probe {

class Sha256 {
 public:
  static constexpr size_t kBytes = 32;
  void add(const void* data, size_t count);
  // Once, after everything was added.
  void finish(uint8_t out[kBytes]);

 private:
  void block(const uint8_t* data);

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t pending_[64];
  uint64_t total_ = 0;
};

}  // namespace minivmm::probe
