// SPDX-License-Identifier: Apache-2.0
// A 16550A UART: the registers, the interrupt causes and a 64-byte receive FIFO. It knows no file
// descriptor and no KVM: output goes to a SerialOutput, the interrupt to a callback. One mutex
// inside; any thread may call anything. Never blocks: where the output cannot take a byte the
// transmitter says it is busy, and a guest that writes all the same loses the byte to the output's
// drop counter.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>

#include "vmm/bus.h"

namespace minivmm::vmm {

class SerialOutput {
 public:
  virtual ~SerialOutput() = default;
  // False while a polite guest should wait. Called with the UART locked: must not call back.
  virtual bool ready() = 0;
  // Takes all of it, or counts what it drops. Must not wait.
  virtual void put(std::span<const std::byte> bytes) = 0;
};

class Serial final : public BusDevice {
 public:
  static constexpr uint64_t kPorts = 8;
  static constexpr size_t kReceiveFifo = 64;

  // `raise` makes one edge on the interrupt line. Both must outlive this.
  Serial(SerialOutput& output, std::function<void()> raise);

  void read(uint64_t offset, std::span<std::byte> data) override;
  void write(uint64_t offset, std::span<const std::byte> data) override;

  // Bytes typed into the guest. Returns how many fitted; after a short return on_drained is called
  // once there is room again.
  size_t receive(std::span<const std::byte> bytes);
  // Set before use. Called on a vCPU thread without the lock.
  void set_on_drained(std::function<void()> callback) { on_drained_ = std::move(callback); }
  // The output has become ready again: lets an interrupt-driven transmitter go on.
  void output_ready();

 private:
  uint8_t read_register(uint64_t offset);
  void write_register(uint64_t offset, uint8_t value);
  void transmit(uint8_t value);
  uint8_t line_status();
  uint8_t modem_status() const;
  bool transmitter_empty();
  uint8_t interrupt_cause();
  void update_interrupt();
  void push_received(uint8_t value);
  void clear_receive_fifo();

  SerialOutput& output_;
  const std::function<void()> raise_;
  std::function<void()> on_drained_;

  std::mutex mutex_;
  // Below: protected by mutex_.
  uint8_t ier_ = 0;
  uint8_t fcr_ = 0;
  uint8_t lcr_ = 0x03;
  uint8_t mcr_ = 0x08;
  uint8_t scratch_ = 0;
  uint16_t divisor_ = 12;
  bool overrun_ = false;
  bool thr_empty_pending_ = false;  // a THR-empty interrupt not yet seen by the guest
  uint8_t line_ = 0x01;             // the cause (as in IIR) for which the line is up
  bool sender_waits_ = false;       // receive() returned short
  bool drained_ = false;            // on_drained_ is due
  std::array<uint8_t, kReceiveFifo> fifo_{};
  size_t fifo_head_ = 0;
  size_t fifo_count_ = 0;
};

}  // namespace minivmm::vmm
