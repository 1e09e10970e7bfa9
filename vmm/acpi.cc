// SPDX-License-Identifier: Apache-2.0
#include "vmm/acpi.h"

#include <errno.h>
#include <string>
#include <string_view>

#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"
#include "vmm/aml.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

using base::store_le;
using Bytes = std::vector<std::byte>;

constexpr size_t kRsdpBytes = 36;
constexpr uint64_t kTableAlignment = 16;

template <typename T>
void put(Bytes& out, T value) {
  out.resize(out.size() + sizeof(T));
  store_le<T>(&out[out.size() - sizeof(T)], value);
}

void put_text(Bytes& out, std::string_view text) {
  for (const char c : text) out.push_back(static_cast<std::byte>(c));
}

// The bytes of [begin, end) then add up to zero.
void set_checksum(Bytes& table, size_t at, size_t begin, size_t end) {
  table[at] = std::byte{0};
  uint8_t sum = 0;
  for (size_t i = begin; i < end; ++i) {
    sum = static_cast<uint8_t>(sum + std::to_integer<uint8_t>(table[i]));
  }
  table[at] = static_cast<std::byte>(0x100 - sum);
}

// signature, length, revision, checksum, OEM id and table id, OEM revision, creator and its
// revision
Bytes header(std::string_view signature, uint8_t revision) {
  Bytes out;
  put_text(out, signature);
  put<uint32_t>(out, 0);
  put<uint8_t>(out, revision);
  put<uint8_t>(out, 0);
  put_text(out, "MINVMM");
  put_text(out, "MINIVMM ");
  put<uint32_t>(out, 1);
  put_text(out, "MVMM");
  put<uint32_t>(out, 1);
  return out;
}

Bytes finish(Bytes table) {
  store_le<uint32_t>(&table[4], static_cast<uint32_t>(table.size()));
  set_checksum(table, 9, 0, table.size());
  return table;
}

// --- DSDT ---

Bytes uart() {
  return aml::device(
      "COM1",
      aml::concat({aml::name("_HID", aml::eisa_id("PNP0501")), aml::name("_UID", aml::integer(0)),
                   aml::name("_CRS", aml::resource_template({aml::io_ports(kSerialPort, 8),
                                                             aml::isa_irq(kSerialGsi)}))}));
}

Bytes virtio_device(unsigned index, const AcpiDevice& device) {
  if (device.size == 0 || device.base > UINT32_MAX || device.size - 1 > UINT32_MAX - device.base) {
    throw base::Error(EINVAL,
                      fmt::format("ACPI: a window of {:#x} bytes at {:#x} is not below 4 GiB",
                                  device.size, device.base));
  }
  const Bytes resources = aml::resource_template(
      {aml::memory32_fixed(static_cast<uint32_t>(device.base), static_cast<uint32_t>(device.size)),
       aml::interrupt(device.gsi)});
  return aml::device(fmt::format("V{:03X}", index),
                     aml::concat({aml::name("_HID", aml::string("LNRO0005")),
                                  aml::name("_UID", aml::integer(index)),
                                  aml::name("_CCA", aml::integer(1)),  // DMA is coherent
                                  aml::name("_CRS", resources)}));
}

Bytes dsdt(const AcpiInput& input) {
  Bytes devices = uart();
  unsigned index = 0;
  for (const AcpiDevice& device : input.devices) {
    devices = aml::concat({devices, virtio_device(index++, device)});
  }
  // Sleep type 5 is what PowerRegisters takes for "off".
  const Bytes off = aml::name(
      "_S5_", aml::package({aml::integer(5), aml::integer(0), aml::integer(0), aml::integer(0)}));
  return finish(aml::concat({header("DSDT", 2), aml::root_scope("_SB_", devices), off}));
}

// --- The fixed tables ---

// Generic address structure: one byte-wide port.
void store_port(Bytes& table, size_t at, uint64_t port) {
  constexpr uint8_t kSystemIo = 1;
  constexpr uint8_t kByteAccess = 1;
  table[at] = std::byte{kSystemIo};
  table[at + 1] = std::byte{8};
  table[at + 2] = std::byte{0};
  table[at + 3] = std::byte{kByteAccess};
  store_le<uint64_t>(&table[at + 4], port);
}

Bytes fadt(uint64_t dsdt_address) {
  constexpr size_t kBytes = 276;
  constexpr uint16_t kNoVga = 1 << 2;
  constexpr uint16_t kNoCmosClock = 1 << 5;  // else Linux spends seconds on finding none
  constexpr uint32_t kNoPowerButton = 1 << 4;
  constexpr uint32_t kNoSleepButton = 1 << 5;
  constexpr uint32_t kResetRegister = 1 << 10;
  constexpr uint32_t kHardwareReduced = 1 << 20;
  Bytes out = header("FACP", 6);
  out.resize(kBytes);
  store_le<uint16_t>(&out[109], kNoVga | kNoCmosClock);
  store_le<uint32_t>(&out[112],
                     kNoPowerButton | kNoSleepButton | kResetRegister | kHardwareReduced);
  store_port(out, 116, kPowerPort);
  out[128] = std::byte{1};  // written there, resets
  out[131] = std::byte{5};  // minor revision
  store_le<uint64_t>(&out[140], dsdt_address);
  store_port(out, 244, kPowerPort);      // sleep control
  store_port(out, 256, kPowerPort + 1);  // sleep status
  std::memcpy(&out[268], "MINIVMM", 7);  // hypervisor
  return finish(std::move(out));
}

Bytes madt(const AcpiInput& input) {
  Bytes out = header("APIC", 5);
  put<uint32_t>(out, kLapicAddress);
  put<uint32_t>(out, 0);  // no 8259 to be switched off
  for (unsigned i = 0; i < input.vcpus; ++i) {
    put<uint8_t>(out, 0);  // processor local APIC
    put<uint8_t>(out, 8);
    put<uint8_t>(out, static_cast<uint8_t>(i));  // processor uid
    put<uint8_t>(out, static_cast<uint8_t>(i));  // APIC id
    put<uint32_t>(out, 1);                       // enabled
  }
  put<uint8_t>(out, 1);  // IOAPIC
  put<uint8_t>(out, 12);
  put<uint8_t>(out, 0);  // id
  put<uint8_t>(out, 0);
  put<uint32_t>(out, kIoapicAddress);
  put<uint32_t>(out, 0);  // its first GSI
  return finish(std::move(out));
}

Bytes xsdt(std::initializer_list<uint64_t> tables) {
  Bytes out = header("XSDT", 1);
  for (const uint64_t table : tables) put<uint64_t>(out, table);
  return finish(std::move(out));
}

Bytes rsdp(uint64_t xsdt_address) {
  Bytes out;
  put_text(out, "RSD PTR ");
  put<uint8_t>(out, 0);  // checksum of the first 20 bytes
  put_text(out, "MINVMM");
  put<uint8_t>(out, 2);   // revision
  put<uint32_t>(out, 0);  // no RSDT
  put<uint32_t>(out, kRsdpBytes);
  put<uint64_t>(out, xsdt_address);
  put<uint32_t>(out, 0);  // checksum of all, reserved
  set_checksum(out, 8, 0, 20);
  set_checksum(out, 32, 0, kRsdpBytes);
  return out;
}

}  // namespace

std::vector<std::byte> make_acpi_tables(const AcpiInput& input, uint64_t address) {
  Bytes out(kRsdpBytes);
  const auto add = [&](const Bytes& table) {
    out.resize(base::align_up<uint64_t>(out.size(), kTableAlignment));
    const uint64_t at = address + out.size();
    out.insert(out.end(), table.begin(), table.end());
    return at;
  };
  const uint64_t dsdt_at = add(dsdt(input));
  const uint64_t fadt_at = add(fadt(dsdt_at));
  const uint64_t madt_at = add(madt(input));
  const Bytes root = rsdp(add(xsdt({fadt_at, madt_at})));
  std::memcpy(out.data(), root.data(), root.size());
  return out;
}

}  // namespace minivmm::vmm
