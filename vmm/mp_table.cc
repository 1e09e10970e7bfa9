// SPDX-License-Identifier: Apache-2.0
#include "vmm/mp_table.h"

#include <string_view>

#include "base/bytes.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

using Bytes = std::vector<std::byte>;

constexpr size_t kPointerBytes = 16;
constexpr size_t kHeaderBytes = 44;
constexpr uint8_t kSpecification = 4;  // 1.4
constexpr uint8_t kLapicVersion = 0x14;
constexpr uint8_t kIoapicVersion = 0x11;
constexpr uint8_t kIsaBus = 0;
constexpr uint8_t kAllLapics = 0xff;

template <typename T>
void put(Bytes& out, T value) {
  out.resize(out.size() + sizeof(T));
  base::store_le<T>(&out[out.size() - sizeof(T)], value);
}

void put_text(Bytes& out, std::string_view text) {
  for (const char c : text) out.push_back(static_cast<std::byte>(c));
}

void set_checksum(Bytes& bytes, size_t at, size_t begin, size_t end) {
  uint8_t sum = 0;
  for (size_t i = begin; i < end; ++i) {
    sum = static_cast<uint8_t>(sum + std::to_integer<uint8_t>(bytes[i]));
  }
  bytes[at] = static_cast<std::byte>(0x100 - sum);
}

void put_processor(Bytes& out, uint8_t apic_id) {
  constexpr uint8_t kEnabled = 1;
  constexpr uint8_t kBootProcessor = 2;
  put<uint8_t>(out, 0);
  put<uint8_t>(out, apic_id);
  put<uint8_t>(out, kLapicVersion);
  put<uint8_t>(out, static_cast<uint8_t>(kEnabled | (apic_id == 0 ? kBootProcessor : 0)));
  put<uint32_t>(out, 0x600);  // signature: family 6
  put<uint32_t>(out, 0x201);  // features: FPU, APIC
  put<uint64_t>(out, 0);
}

// Interrupt entries have one form; those of the local APIC's own pins have type 4.
void put_interrupt(Bytes& out, uint8_t type, uint8_t kind, uint8_t line, uint8_t target_id,
                   uint8_t target_pin) {
  put<uint8_t>(out, type);
  put<uint8_t>(out, kind);
  put<uint16_t>(out, 0);  // as the bus has it: edge-triggered, active-high
  put<uint8_t>(out, kIsaBus);
  put<uint8_t>(out, line);
  put<uint8_t>(out, target_id);
  put<uint8_t>(out, target_pin);
}

}  // namespace

std::vector<std::byte> make_mp_table(unsigned vcpus, uint64_t address) {
  const auto ioapic_id = static_cast<uint8_t>(vcpus);  // unlike any processor's
  Bytes entries;
  for (unsigned i = 0; i < vcpus; ++i) put_processor(entries, static_cast<uint8_t>(i));
  put<uint8_t>(entries, 1);
  put<uint8_t>(entries, kIsaBus);
  put_text(entries, "ISA   ");
  put<uint8_t>(entries, 2);
  put<uint8_t>(entries, ioapic_id);
  put<uint8_t>(entries, kIoapicVersion);
  put<uint8_t>(entries, 1);  // enabled
  put<uint32_t>(entries, kIoapicAddress);
  constexpr uint8_t kInt = 0;
  constexpr uint8_t kNmi = 1;
  constexpr uint8_t kExtInt = 3;
  for (uint8_t pin = 0; pin < kIoapicPins; ++pin) {
    put_interrupt(entries, 3, kInt, pin, ioapic_id, pin);
  }
  put_interrupt(entries, 4, kExtInt, 0, 0, 0);
  put_interrupt(entries, 4, kNmi, 0, kAllLapics, 1);

  const size_t table_bytes = kHeaderBytes + entries.size();
  Bytes out;
  put_text(out, "_MP_");
  put<uint32_t>(out, static_cast<uint32_t>(address + kPointerBytes));
  put<uint8_t>(out, 1);  // in units of 16 bytes
  put<uint8_t>(out, kSpecification);
  put<uint8_t>(out, 0);  // checksum
  out.resize(kPointerBytes);
  put_text(out, "PCMP");
  put<uint16_t>(out, static_cast<uint16_t>(table_bytes));
  put<uint8_t>(out, kSpecification);
  put<uint8_t>(out, 0);  // checksum
  put_text(out, "MINIVMM ");
  put_text(out, "VIRTUAL     ");
  put<uint32_t>(out, 0);  // no OEM table, of no bytes
  put<uint16_t>(out, 0);
  put<uint16_t>(out, static_cast<uint16_t>(vcpus + 2 + kIoapicPins + 2));
  put<uint32_t>(out, kLapicAddress);
  put<uint32_t>(out, 0);  // no extended table
  out.insert(out.end(), entries.begin(), entries.end());
  set_checksum(out, 10, 0, kPointerBytes);
  set_checksum(out, kPointerBytes + 7, kPointerBytes, out.size());
  return out;
}

}  // namespace minivmm::vmm
