// SPDX-License-Identifier: Apache-2.0
#include "clock.h"

#include "arch.h"

namespace minivmm::probe {
namespace {

uint64_t khz = 0;
uint64_t start_tsc = 0;
uint64_t ns_per_tick_32 = 0;  // nanoseconds a TSC tick, times 2^32
StringView source;

// KVM's structure; it fills the page after the MSR has been written.
struct PvClock {
  uint32_t version;
  uint32_t pad;
  uint64_t tsc_timestamp;
  uint64_t system_time;
  uint32_t tsc_to_system_mul;
  int8_t tsc_shift;
  uint8_t flags;
  uint8_t pad2[2];
};
alignas(64) volatile PvClock pv_clock;

bool is_kvm(const CpuidResult& leaf) {
  return leaf.ebx == 0x4b4d564b && leaf.ecx == 0x564b4d56 && leaf.edx == 0x4d;
}

uint64_t kvmclock_khz() {
  constexpr uint32_t kClockSource2 = 1 << 3;
  constexpr uint32_t kMsrSystemTime = 0x4b564d01;
  if ((cpuid(0x40000001).eax & kClockSource2) == 0) return 0;
  write_msr(kMsrSystemTime, reinterpret_cast<uint64_t>(&pv_clock) | 1);
  for (int i = 0; i < 1000 && pv_clock.tsc_to_system_mul == 0; ++i) pause();
  const uint64_t mul = pv_clock.tsc_to_system_mul;
  const int shift = pv_clock.tsc_shift;
  write_msr(kMsrSystemTime, 0);
  if (mul == 0 || shift < -31 || shift > 31) return 0;
  // ns = (ticks << shift) * mul >> 32
  const uint64_t unshifted = (uint64_t{1000000} << 32) / mul;
  return shift < 0 ? unshifted << -shift : unshifted >> shift;
}

uint16_t pit_count() {
  out8(0x43, 0x00);  // latch channel 0
  const uint8_t low = in8(0x40);
  return static_cast<uint16_t>(low | in8(0x40) << 8);
}

// Counts TSC ticks while channel 0 of the PIT runs for about 20 ms. Channel 0, because the gate of
// channel 2 belongs to a speaker port that small machines do not have.
uint64_t pit_khz() {
  constexpr uint64_t kPitHz = 1193182;
  constexpr uint16_t kCount = kPitHz / 50;
  out8(0x43, 0x34);  // both bytes, rate generator, from 65536 down
  out8(0x40, 0);
  out8(0x40, 0);
  const uint16_t first = pit_count();
  const uint64_t begin = read_tsc();
  bool moved = false;
  for (int i = 0; i < 1000000; ++i) {
    const auto elapsed = static_cast<uint16_t>(first - pit_count());
    moved = moved || elapsed != 0;
    if (i == 100 && !moved) return 0;  // nothing behind the port
    if (elapsed >= kCount) return (read_tsc() - begin) * kPitHz / elapsed / 1000;
  }
  return 0;
}

}  // namespace

void start_clock(uint64_t forced_khz) {
  khz = forced_khz;
  source = "command line";
  const CpuidResult hypervisor = cpuid(0x40000000);
  if (khz == 0 && is_kvm(hypervisor)) {
    khz = kvmclock_khz();
    source = "kvmclock";
  }
  if (khz == 0 && is_kvm(hypervisor) && hypervisor.eax >= 0x40000010) {
    khz = cpuid(0x40000010).eax;
    source = "timing leaf";
  }
  if (khz == 0) {
    khz = pit_khz();
    source = "PIT";
  }
  if (khz == 0) {
    khz = 2000000;
    source = "guess";
  }
  ns_per_tick_32 = (uint64_t{1000000} << 32) / khz;
  start_tsc = read_tsc();
}

uint64_t clock_khz() { return khz; }
StringView clock_source() { return source; }

uint64_t now_ns() {
  const unsigned __int128 product =
      static_cast<unsigned __int128>(read_tsc() - start_tsc) * ns_per_tick_32;
  return static_cast<uint64_t>(product >> 32);
}

}  // namespace minivmm::probe
