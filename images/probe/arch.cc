// SPDX-License-Identifier: Apache-2.0
#include "arch.h"

#include "text.h"

extern "C" {
enum GateOp : uint64_t {
  kGateWrite,
  kGateWait,
  kGateReadMsr,
  kGateWriteMsr,
  kGateCpuid,
  kGateOut8,
  kGateIn8,
  kGateEnable,
  kGateExit,
};
uint64_t gate_call(uint64_t op, uint64_t a, uint64_t b);

extern uint64_t idt[512];
extern const uint64_t fault_stubs[32];
extern const char irq_stubs[];
extern const char serial_stub[];
extern const char timer_stub[];
extern const char spurious_stub[];
extern uint64_t irq_base[32];
extern volatile uint32_t irq_count[32];
extern volatile uint32_t irq_status[32];
extern volatile uint32_t serial_received;
extern volatile uint32_t timer_count;
extern volatile uint8_t serial_ring[4096];

void probe_fault(const uint64_t* frame, uint64_t cr2);
}

namespace minivmm::probe {
namespace {

constexpr unsigned kIrqVector = 0x30;
constexpr unsigned kSerialVector = 0x50;
constexpr unsigned kTimerVector = 0x51;
constexpr unsigned kSpuriousVector = 0xff;
constexpr unsigned kIrqStubBytes = 16;
constexpr unsigned kSerialGsi = 4;
constexpr uint32_t kSerialRingBytes = 4096;

constexpr uint64_t kLapic = 0xfee00000;
constexpr uint64_t kLapicSpurious = 0xf0;
constexpr uint64_t kLapicTimer = 0x320;
constexpr uint64_t kLapicLint0 = 0x350;
constexpr uint64_t kLapicTimerInitial = 0x380;
constexpr uint64_t kLapicTimerDivide = 0x3e0;
constexpr uint32_t kLapicMasked = 0x10000;
constexpr uint32_t kLapicPeriodic = 0x20000;

// QEMU's microvm may have a second controller with lines 24 to 47.
constexpr uint64_t kIoapics[] = {0xfec00000, 0xfec10000};
constexpr unsigned kIoapicLines = 24;

volatile uint32_t& mmio32(uint64_t address) {
  return *reinterpret_cast<volatile uint32_t*>(address);
}

void set_gate(unsigned vector, uint64_t handler) {
  constexpr uint64_t kInterruptGate = 0x8e00;
  constexpr uint64_t kKernelCode = 0x10;
  idt[vector * 2] = (handler & 0xffff) | (kKernelCode << 16) | (kInterruptGate << 32) |
                    ((handler >> 16 & 0xffff) << 48);
  idt[vector * 2 + 1] = handler >> 32;
}

uint64_t address_of(const char* label) { return reinterpret_cast<uint64_t>(label); }

bool route(unsigned gsi, unsigned vector) {
  const unsigned controller = gsi / kIoapicLines;
  if (controller >= sizeof kIoapics / sizeof kIoapics[0]) return false;
  const uint64_t base = kIoapics[controller];
  const auto write = [base](uint32_t index, uint32_t value) {
    mmio32(base) = index;
    mmio32(base + 0x10) = value;
  };
  const uint32_t entry = 0x10 + 2 * (gsi % kIoapicLines);
  write(entry + 1, 0);   // to CPU 0
  write(entry, vector);  // fixed, edge, active high, not masked
  return true;
}

}  // namespace

void start_interrupts() {
  for (unsigned i = 0; i < 32; ++i) set_gate(i, fault_stubs[i]);
  for (unsigned i = 0; i < kIrqSlots; ++i) {
    set_gate(kIrqVector + i, address_of(irq_stubs) + i * kIrqStubBytes);
  }
  set_gate(kSerialVector, address_of(serial_stub));
  set_gate(kTimerVector, address_of(timer_stub));
  set_gate(kSpuriousVector, address_of(spurious_stub));

  mmio32(kLapic + kLapicLint0) = kLapicMasked;
  mmio32(kLapic + kLapicSpurious) = 0x100 | kSpuriousVector;
  // Only a tick by which waits notice their deadline, so the bus clock (1 GHz on KVM and QEMU) need
  // not be measured.
  mmio32(kLapic + kLapicTimerDivide) = 0x3;  // by 16
  mmio32(kLapic + kLapicTimer) = kLapicPeriodic | kTimerVector;
  mmio32(kLapic + kLapicTimerInitial) = kTickMs * (1000000 / 16);
  route(kSerialGsi, kSerialVector);
  gate_call(kGateEnable, 0, 0);
  // Switching the FIFOs on empties them; what was typed before is kept.
  while ((in8(0x3fd) & 0x01) != 0) {
    serial_ring[serial_received % kSerialRingBytes] = in8(0x3f8);
    serial_received = serial_received + 1;
  }
  out8(0x3fa, 0x01);  // FIFOs on
  out8(0x3fc, 0x0b);  // DTR, RTS and OUT2, which lets the interrupt through
  out8(0x3f9, 0x01);  // interrupt on received data
}

bool route_device_irq(unsigned slot, uint64_t base, unsigned gsi) {
  irq_base[slot] = base;
  return route(gsi, kIrqVector + slot);
}

uint32_t device_irqs(unsigned slot) { return irq_count[slot]; }

uint32_t take_irq_status(unsigned slot) {
  return __atomic_exchange_n(&irq_status[slot], 0, __ATOMIC_SEQ_CST);
}

void sleep_for_device(unsigned slot, uint32_t seen) {
  gate_call(kGateWait, reinterpret_cast<uint64_t>(&irq_count[slot]), seen);
}

void sleep_for_tick() {
  gate_call(kGateWait, reinterpret_cast<uint64_t>(&timer_count), timer_count);
}

void serial_write(StringView text) {
  gate_call(kGateWrite, reinterpret_cast<uint64_t>(text.data()), text.size());
}

namespace {
uint32_t serial_taken = 0;
}

int serial_read() {
  const uint32_t received = serial_received;
  if (received == serial_taken) return -1;
  // What was typed faster than it was read is lost from the front.
  if (received - serial_taken > kSerialRingBytes) serial_taken = received - kSerialRingBytes;
  return serial_ring[serial_taken++ % kSerialRingBytes];
}

void serial_wait() {
  while (serial_received == serial_taken) {
    gate_call(kGateWait, reinterpret_cast<uint64_t>(&serial_received), serial_taken);
  }
}

uint64_t read_msr(uint32_t index) { return gate_call(kGateReadMsr, index, 0); }
void write_msr(uint32_t index, uint64_t value) { gate_call(kGateWriteMsr, index, value); }

// Through the gate: natively at CPL 3 the answer may be the host's.
CpuidResult cpuid(uint32_t function) {
  CpuidResult out{function, 0, 0, 0};
  gate_call(kGateCpuid, reinterpret_cast<uint64_t>(&out), 0);
  return out;
}

uint8_t in8(uint16_t port) { return static_cast<uint8_t>(gate_call(kGateIn8, port, 0)); }
void out8(uint16_t port, uint8_t value) { gate_call(kGateOut8, port, value); }

void machine_end(int status) {
  gate_call(kGateExit, static_cast<uint64_t>(status), 0);
  __builtin_unreachable();
}

}  // namespace minivmm::probe

// Runs at CPL 0, so without the gate. `frame` is {vector, code, rip, cs, rflags, rsp, ss}.
void probe_fault(const uint64_t* frame, uint64_t cr2) {
  minivmm::probe::Line line;
  line.text("probe: FAULT vector=").number(frame[0]).text(" code=").hex(frame[1]);
  line.text(" rip=").hex(frame[2]).text(" cs=").hex(frame[3]).text(" rsp=").hex(frame[5]);
  line.text(" cr2=").hex(cr2).text("\n");
  for (const char c : line.view()) {
    asm volatile("outb %0, %1" : : "a"(c), "Nd"(static_cast<uint16_t>(0x3f8)));
  }
}
