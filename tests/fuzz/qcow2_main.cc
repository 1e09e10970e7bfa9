// SPDX-License-Identifier: Apache-2.0
// What libFuzzer calls in the targets whose input is a qcow2 image.
#include "base/log.h"
#include "tests/fuzz/qcow2_input.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  return minivmm::block::mutate_qcow2(data, size, most, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  minivmm::base::set_log_level(minivmm::base::LogLevel::kOff);
  static minivmm::base::LoopGroup loops(1);
  if (size == 0 || size > 1 << 20) return 0;
  // SAFETY: octets as bytes.
  const std::span image(reinterpret_cast<const std::byte*>(data), size);
  minivmm::block::use_image(loops, image);
  return 0;
}
