// SPDX-License-Identifier: Apache-2.0
#include "vmm/legacy_devices.h"

#include <algorithm>

#include <fmt/core.h>

namespace minivmm::vmm {
namespace {

constexpr uint64_t kI8042Speaker = 1;  // port 0x61
constexpr uint64_t kI8042Command = 4;  // port 0x64
constexpr std::byte kPulseReset{0xfe};
constexpr std::byte kTimerOutput{0x20};
constexpr std::byte kResetValue{1};
constexpr std::byte kSleepTypeS5{(5 << 2) | 0x20};

}  // namespace

void I8042::read(uint64_t offset, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset == kI8042Speaker) data[0] = kTimerOutput;
}

void I8042::write(uint64_t offset, std::span<const std::byte> data) {
  if (offset == kI8042Command && data[0] == kPulseReset) {
    end_({ExitKind::kReset, 0, "the guest reset itself (keyboard controller)"});
  }
}

void EmptyCmos::read(uint64_t, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
}

void EmptyCmos::write(uint64_t, std::span<const std::byte>) {}

void PowerRegisters::read(uint64_t, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
}

void PowerRegisters::write(uint64_t offset, std::span<const std::byte> data) {
  if (offset == 0 && data[0] == kResetValue) {
    end_({ExitKind::kReset, 0, "the guest reset itself (reset register)"});
  } else if (data[0] == kSleepTypeS5) {
    end_({ExitKind::kPowerOff, 0, "the guest switched itself off"});
  }
}

void DebugExit::read(uint64_t, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
}

void DebugExit::write(uint64_t, std::span<const std::byte> data) {
  const int status = std::to_integer<int>(data[0]);
  end_({ExitKind::kGuestExit, status, fmt::format("the guest exited with status {}", status)});
}

}  // namespace minivmm::vmm
