// SPDX-License-Identifier: Apache-2.0
// The few ports of a PC that a guest needs in order to end, or that cost it seconds where nothing
// sensible answers. Stateless, so any thread may call them; each reports through a callback that
// does not wait.
#pragma once

#include <functional>

#include "vmm/bus.h"
#include "vmm/exit_reason.h"

namespace minivmm::vmm {

using EndCallback = std::function<void(ExitReason)>;

// Keyboard controller, ports 0x60 to 0x64: only the reset pulse (0xfe to 0x64), a status that says
// "idle" so that nobody spins on it, and port 0x61 as a PIT-calibrating guest wants it.
class I8042 final : public BusDevice {
 public:
  static constexpr uint64_t kBase = 0x60;
  static constexpr uint64_t kPorts = 5;
  explicit I8042(EndCallback end) : end_(std::move(end)) {}
  void read(uint64_t offset, std::span<std::byte> data) override;
  void write(uint64_t offset, std::span<const std::byte> data) override;

 private:
  const EndCallback end_;
};

// CMOS, ports 0x70 and 0x71: reads as zero, because all ones would mean an update in progress that
// never ends.
class EmptyCmos final : public BusDevice {
 public:
  static constexpr uint64_t kBase = 0x70;
  static constexpr uint64_t kPorts = 2;
  void read(uint64_t offset, std::span<std::byte> data) override;
  void write(uint64_t offset, std::span<const std::byte> data) override;
};

// ACPI reset and sleep registers (hardware-reduced): 1 to the first port resets, sleep type 5 with
// the enable bit switches off, at either port.
class PowerRegisters final : public BusDevice {
 public:
  static constexpr uint64_t kPorts = 2;
  explicit PowerRegisters(EndCallback end) : end_(std::move(end)) {}
  void read(uint64_t offset, std::span<std::byte> data) override;
  void write(uint64_t offset, std::span<const std::byte> data) override;

 private:
  const EndCallback end_;
};

// The exit port: the low byte of what is written is the guest's status. Four ports wide, as QEMU's
// isa-debug-exit is.
class DebugExit final : public BusDevice {
 public:
  static constexpr uint64_t kPorts = 4;
  explicit DebugExit(EndCallback end) : end_(std::move(end)) {}
  void read(uint64_t offset, std::span<std::byte> data) override;
  void write(uint64_t offset, std::span<const std::byte> data) override;

 private:
  const EndCallback end_;
};

}  // namespace minivmm::vmm
