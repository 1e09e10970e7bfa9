// SPDX-License-Identifier: Apache-2.0
// The program's side of boot.S: the gate to the privileged part, interrupts, serial line, sleep.
// The probe has one CPU and one thread; interrupt handlers only count.
#pragma once

#include <cstdint>

#include "string_view.h"

namespace minivmm::probe {

inline constexpr unsigned kIrqSlots = 32;

// Builds the interrupt table and switches interrupts on, with a tick every `kTickMs`.
void start_interrupts();
inline constexpr unsigned kTickMs = 50;

// Routes `gsi` (edge) to interrupt slot `slot` of the device whose registers lie at `base`: the
// handler reads and acknowledges InterruptStatus there. False where no controller has that line.
bool route_device_irq(unsigned slot, uint64_t base, unsigned gsi);
// Interrupts taken by a slot so far.
uint32_t device_irqs(unsigned slot);
// Causes seen by a slot since the last call (bit 0 used ring, bit 1 configuration).
uint32_t take_irq_status(unsigned slot);

// Sleep until an interrupt of any kind, unless the slot's count is no longer `seen`.
void sleep_for_device(unsigned slot, uint32_t seen);
// Sleep until the next interrupt, at the latest the next tick.
void sleep_for_tick();

void serial_write(StringView text);
// The next byte that was typed, or -1.
int serial_read();
// Sleeps until something has been typed.
void serial_wait();

uint64_t read_msr(uint32_t index);
void write_msr(uint32_t index, uint64_t value);
struct CpuidResult {
  uint32_t eax, ebx, ecx, edx;
};
// Leaf `function`, subleaf 0, as the virtual machine monitor defines it.
CpuidResult cpuid(uint32_t function);
uint8_t in8(uint16_t port);
void out8(uint16_t port, uint8_t value);

inline uint64_t read_tsc() {
  uint32_t low = 0;
  uint32_t high = 0;
  asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
  return (uint64_t{high} << 32) | low;
}
inline void pause() { asm volatile("pause" : : : "memory"); }

[[noreturn]] void machine_end(int status);

}  // namespace minivmm::probe
