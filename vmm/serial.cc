// SPDX-License-Identifier: Apache-2.0
#include "vmm/serial.h"

#include <algorithm>
#include <utility>

namespace minivmm::vmm {
namespace {

// Register offsets; 0 and 1 are the divisor while LCR.DLAB is set.
enum Register : uint64_t { kData, kIer, kIirFcr, kLcr, kMcr, kLsr, kMsr, kScratch };

constexpr uint8_t kIerReceive = 0x01;
constexpr uint8_t kIerThrEmpty = 0x02;
constexpr uint8_t kIerLineStatus = 0x04;
constexpr uint8_t kIirNone = 0x01;
constexpr uint8_t kIirThrEmpty = 0x02;
constexpr uint8_t kIirReceive = 0x04;
constexpr uint8_t kIirLineStatus = 0x06;
constexpr uint8_t kIirFifoBits = 0xc0;
constexpr uint8_t kFcrEnable = 0x01;
constexpr uint8_t kFcrClearReceive = 0x02;
constexpr uint8_t kLcrDlab = 0x80;
constexpr uint8_t kMcrLoop = 0x10;
constexpr uint8_t kLsrData = 0x01;
constexpr uint8_t kLsrOverrun = 0x02;
constexpr uint8_t kLsrIdle = 0x60;  // THR and shift register empty

}  // namespace

Serial::Serial(SerialOutput& output, std::function<void()> raise)
    : output_(output), raise_(std::move(raise)) {}

void Serial::read(uint64_t offset, std::span<std::byte> data) {
  bool drained = false;
  {
    std::lock_guard lock(mutex_);
    // A wide access reads consecutive registers, as an 8-bit device on the bus does.
    for (auto& byte : data) byte = std::byte{read_register(offset++)};
    drained = std::exchange(drained_, false);
  }
  if (drained && on_drained_) on_drained_();
}

void Serial::write(uint64_t offset, std::span<const std::byte> data) {
  bool drained = false;
  {
    std::lock_guard lock(mutex_);
    for (const auto byte : data) write_register(offset++, std::to_integer<uint8_t>(byte));
    drained = std::exchange(drained_, false);
  }
  if (drained && on_drained_) on_drained_();
}

size_t Serial::receive(std::span<const std::byte> bytes) {
  std::lock_guard lock(mutex_);
  // In loop-back the receiver hears the transmitter alone.
  const size_t room = (mcr_ & kMcrLoop) != 0 ? 0 : kReceiveFifo - fifo_count_;
  const size_t taken = std::min(bytes.size(), room);
  for (const auto byte : bytes.first(taken)) push_received(std::to_integer<uint8_t>(byte));
  sender_waits_ = taken < bytes.size();
  update_interrupt();
  return taken;
}

void Serial::output_ready() {
  std::lock_guard lock(mutex_);
  update_interrupt();
}

uint8_t Serial::read_register(uint64_t offset) {
  switch (offset) {
    case kData: {
      if ((lcr_ & kLcrDlab) != 0) return static_cast<uint8_t>(divisor_);
      if (fifo_count_ == 0) return 0;
      const uint8_t value = fifo_[fifo_head_];
      fifo_head_ = (fifo_head_ + 1) % kReceiveFifo;
      if (--fifo_count_ == 0) {
        if (std::exchange(sender_waits_, false)) drained_ = true;
        update_interrupt();
      }
      return value;
    }
    case kIer:
      return (lcr_ & kLcrDlab) != 0 ? static_cast<uint8_t>(divisor_ >> 8) : ier_;
    case kIirFcr: {
      const uint8_t cause = interrupt_cause();
      if (cause == kIirThrEmpty) {
        thr_empty_pending_ = false;
        update_interrupt();
      }
      return (fcr_ & kFcrEnable) != 0 ? cause | kIirFifoBits : cause;
    }
    case kLcr:
      return lcr_;
    case kMcr:
      return mcr_;
    case kLsr: {
      const uint8_t status = line_status();
      overrun_ = false;
      update_interrupt();
      return status;
    }
    case kMsr:
      return modem_status();
    default:
      return scratch_;
  }
}

void Serial::write_register(uint64_t offset, uint8_t value) {
  switch (offset) {
    case kData:
      if ((lcr_ & kLcrDlab) != 0) {
        divisor_ = static_cast<uint16_t>((divisor_ & 0xff00) | value);
      } else {
        transmit(value);
      }
      break;
    case kIer:
      if ((lcr_ & kLcrDlab) != 0) {
        divisor_ = static_cast<uint16_t>((divisor_ & 0xff) | (value << 8));
        break;
      }
      // Enabling the transmit interrupt raises it at once: the transmitter is empty.
      if ((value & ~ier_ & kIerThrEmpty) != 0) thr_empty_pending_ = true;
      ier_ = value & 0x0f;
      line_ = kIirNone;
      update_interrupt();
      break;
    case kIirFcr:
      // Switching the FIFOs on or off empties them, as the clear bit does.
      if (((value ^ fcr_) & kFcrEnable) != 0 || (value & kFcrClearReceive) != 0) {
        clear_receive_fifo();
      }
      fcr_ = value & 0xc9;
      break;
    case kLcr:
      lcr_ = value;
      break;
    case kMcr:
      if ((mcr_ & ~value & kMcrLoop) != 0 && std::exchange(sender_waits_, false)) drained_ = true;
      mcr_ = value & 0x1f;
      break;
    case kScratch:
      scratch_ = value;
      break;
    default:  // LSR and MSR are read-only
      break;
  }
}

void Serial::transmit(uint8_t value) {
  if ((mcr_ & kMcrLoop) != 0) {
    push_received(value);
  } else {
    const std::byte byte{value};
    output_.put(std::span(&byte, 1));
  }
  thr_empty_pending_ = true;
  if (line_ == kIirThrEmpty) line_ = kIirNone;
  update_interrupt();
}

bool Serial::transmitter_empty() { return (mcr_ & kMcrLoop) != 0 || output_.ready(); }

uint8_t Serial::line_status() {
  uint8_t status = 0;
  if (transmitter_empty()) status |= kLsrIdle;
  if (fifo_count_ != 0) status |= kLsrData;
  if (overrun_) status |= kLsrOverrun;
  return status;
}

uint8_t Serial::modem_status() const {
  if ((mcr_ & kMcrLoop) == 0) return 0xb0;  // DCD, DSR, CTS: somebody is there
  uint8_t status = 0;
  if ((mcr_ & 0x02) != 0) status |= 0x10;  // CTS <- RTS
  if ((mcr_ & 0x01) != 0) status |= 0x20;  // DSR <- DTR
  if ((mcr_ & 0x04) != 0) status |= 0x40;  // RI <- OUT1
  if ((mcr_ & 0x08) != 0) status |= 0x80;  // DCD <- OUT2
  return status;
}

uint8_t Serial::interrupt_cause() {
  if (overrun_ && (ier_ & kIerLineStatus) != 0) return kIirLineStatus;
  if (fifo_count_ != 0 && (ier_ & kIerReceive) != 0) return kIirReceive;
  if (thr_empty_pending_ && (ier_ & kIerThrEmpty) != 0 && transmitter_empty()) return kIirThrEmpty;
  return kIirNone;
}

// The interrupt is an edge: the line rises for each cause that becomes the highest, as if it had
// dropped in between, so that one cause behind another is not lost.
void Serial::update_interrupt() {
  const uint8_t cause = interrupt_cause();
  const bool rises = cause != kIirNone && cause != line_;
  line_ = cause;
  if (rises) raise_();
}

void Serial::push_received(uint8_t value) {
  if (fifo_count_ == kReceiveFifo) {
    overrun_ = true;
    return;
  }
  fifo_[(fifo_head_ + fifo_count_++) % kReceiveFifo] = value;
}

void Serial::clear_receive_fifo() {
  fifo_count_ = 0;
  fifo_head_ = 0;
  overrun_ = false;
  update_interrupt();
  if (std::exchange(sender_waits_, false)) drained_ = true;
}

}  // namespace minivmm::vmm
