// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_options.h"

#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::virtio {
namespace {

[[noreturn]] void refuse(const BlockOptions& options, const std::string& why) {
  throw base::Error(EINVAL, fmt::format("{}: {}", options.name, why));
}

void check_power(const BlockOptions& options, const char* option, uint32_t value, uint32_t low,
                 uint32_t high) {
  if (std::has_single_bit(value) && value >= low && value <= high) return;
  refuse(options, fmt::format("{} is {}; it must be a power of two from {} to {}", option, value,
                              low, high));
}

}  // namespace

void check_options(const BlockOptions& o) {
  constexpr uint32_t kLargestBlock = 32768;
  if (o.serial.size() > 20) {
    refuse(o, fmt::format("serial '{}' is longer than 20 bytes", o.serial));
  }
  check_power(o, "logical_block_size", o.logical_block_size, 512, kLargestBlock);
  if (o.physical_block_size != 0) {
    check_power(o, "physical_block_size", o.physical_block_size, o.logical_block_size,
                uint32_t{1} << 21);
  }
  if (o.num_queues < 1 || o.num_queues > 64) {
    refuse(o, fmt::format("num-queues is {}; it must be from 1 to 64", o.num_queues));
  }
  check_power(o, "queue-size", o.queue_size, 4, 1024);
}

}  // namespace minivmm::virtio
