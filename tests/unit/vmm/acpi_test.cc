// SPDX-License-Identifier: Apache-2.0
// AML, the ACPI tables and the MP table: read back here as a kernel does, and by ACPI's own
// disassembler where it is installed.
#include "vmm/acpi.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "base/error.h"
#include "vmm/aml.h"
#include "vmm/layout.h"
#include "vmm/mp_table.h"

namespace minivmm::vmm {
namespace {

using base::load_le;
using Bytes = std::vector<std::byte>;

Bytes bytes(std::initializer_list<int> values) {
  Bytes out;
  for (const int value : values) out.push_back(static_cast<std::byte>(value));
  return out;
}

int sum(std::span<const std::byte> data) {
  int total = 0;
  for (const auto byte : data) total += std::to_integer<int>(byte);
  return total & 0xff;
}

std::vector<AcpiDevice> many_devices(unsigned count) {
  std::vector<AcpiDevice> out;
  for (unsigned i = 0; i < count; ++i) {
    out.push_back(
        {kVirtioWindowBase + i * kVirtioWindowSize, kVirtioWindowSize, kVirtioFirstGsi + i});
  }
  return out;
}

// Tables by signature, found from the RSDP as a kernel finds them; each checksum is checked.
std::map<std::string, Bytes> walk(const Bytes& all, uint64_t address) {
  std::map<std::string, Bytes> out;
  const auto table = [&](uint64_t at) {
    const std::byte* begin = all.data() + (at - address);
    const auto length = load_le<uint32_t>(begin + 4);
    EXPECT_LE(at - address + length, all.size());
    Bytes content(begin, begin + length);
    EXPECT_EQ(sum(content), 0) << "at " << at;
    const std::string signature(reinterpret_cast<const char*>(begin), 4);
    out[signature] = content;
    return content;
  };
  EXPECT_EQ(std::memcmp(all.data(), "RSD PTR ", 8), 0);
  EXPECT_EQ(sum(std::span(all).first(20)), 0);
  EXPECT_EQ(sum(std::span(all).first(36)), 0);
  const Bytes xsdt = table(load_le<uint64_t>(&all[24]));
  for (size_t at = 36; at < xsdt.size(); at += 8) table(load_le<uint64_t>(&xsdt[at]));
  table(load_le<uint64_t>(&out.at("FACP")[140]));
  return out;
}

TEST(Aml, IntegersTakeTheShortestForm) {
  EXPECT_EQ(aml::integer(0), bytes({0x00}));
  EXPECT_EQ(aml::integer(1), bytes({0x01}));
  EXPECT_EQ(aml::integer(2), bytes({0x0a, 2}));
  EXPECT_EQ(aml::integer(0x1ff), bytes({0x0b, 0xff, 0x01}));
  EXPECT_EQ(aml::integer(0x10000), bytes({0x0c, 0, 0, 1, 0}));
  EXPECT_EQ(aml::integer(uint64_t{1} << 32), bytes({0x0e, 0, 0, 0, 0, 1, 0, 0, 0}));
}

TEST(Aml, IdsAndNamesAreChecked) {
  EXPECT_EQ(aml::eisa_id("PNP0501"), bytes({0x0c, 0x41, 0xd0, 0x05, 0x01}));
  EXPECT_THROW((void)aml::eisa_id("PNP05"), base::Error);
  EXPECT_THROW((void)aml::eisa_id("pnp0501"), base::Error);
  EXPECT_THROW((void)aml::eisa_id("PNP050G"), base::Error);
  EXPECT_THROW((void)aml::name("_S5", aml::integer(0)), base::Error);
  EXPECT_THROW((void)aml::name("0ABC", aml::integer(0)), base::Error);
  EXPECT_THROW((void)aml::device("com1", {}), base::Error);
  EXPECT_THROW((void)aml::isa_irq(16), base::Error);
  EXPECT_THROW((void)aml::string("\xc3\xa4"), base::Error);
}

// The length counts its own bytes, so that terms just around a limit are where it goes wrong.
TEST(Aml, LengthsOfTermsAreRightAtEveryLimit) {
  for (const size_t size : {0u, 57u, 58u, 59u, 60u, 4087u, 4088u, 4089u, 4090u, 70000u}) {
    const Bytes device = aml::device("ABCD", Bytes(size, std::byte{0xa3}));
    const auto lead = std::to_integer<uint32_t>(device[2]);
    const uint32_t more = lead >> 6;
    uint32_t length = more == 0 ? lead & 0x3f : lead & 0xf;
    for (uint32_t i = 0; i < more; ++i) {
      length |= std::to_integer<uint32_t>(device[3 + i]) << (4 + 8 * i);
    }
    EXPECT_EQ(length, device.size() - 2) << size;
  }
  EXPECT_THROW((void)aml::device("ABCD", Bytes(size_t{1} << 28)), base::Error);
}

TEST(Acpi, TablesLeadFromTheRootToEveryPart) {
  const auto devices = many_devices(19);
  const Bytes all = make_acpi_tables({.vcpus = 3, .devices = devices}, kAcpiAddress);
  EXPECT_LE(kAcpiAddress + all.size(), kMpTableAddress);
  const auto tables = walk(all, kAcpiAddress);
  ASSERT_TRUE(tables.contains("APIC") && tables.contains("DSDT"));
  const Bytes& fadt = tables.at("FACP");
  ASSERT_EQ(fadt.size(), 276u);
  EXPECT_NE(load_le<uint32_t>(&fadt[112]) & (1u << 20), 0u)
      << "without it Linux wants the PM1 blocks and gives ACPI up";
  EXPECT_EQ(load_le<uint64_t>(&fadt[120]), kPowerPort) << "reset register";
  EXPECT_EQ(load_le<uint64_t>(&fadt[248]), kPowerPort) << "sleep control";
  EXPECT_EQ(load_le<uint64_t>(&fadt[260]), kPowerPort + 1) << "sleep status";
  const Bytes& madt = tables.at("APIC");
  ASSERT_EQ(madt.size(), 44u + 3 * 8 + 12);
  for (unsigned i = 0; i < 3; ++i) {
    EXPECT_EQ(madt[44 + i * 8 + 3], static_cast<std::byte>(i)) << "APIC id";
    EXPECT_EQ(madt[44 + i * 8 + 4], std::byte{1}) << "enabled";
  }
}

TEST(Acpi, ThereIsRoomForAllProcessorsAndDevices) {
  const auto devices = many_devices(kVirtioSlots);
  EXPECT_LE(make_acpi_tables({.vcpus = 254, .devices = devices}, kAcpiAddress).size(),
            kMpTableAddress - kAcpiAddress);
  EXPECT_LE(make_mp_table(254, kMpTableAddress).size(), kResetVectorAddress - kMpTableAddress);
}

TEST(Acpi, RefusesAWindowThatItCannotDescribe) {
  const AcpiDevice high{uint64_t{1} << 32, 0x1000, 5};
  EXPECT_THROW((void)make_acpi_tables({.vcpus = 1, .devices = {&high, 1}}, kAcpiAddress),
               base::Error);
  const AcpiDevice wraps{0xfffff000, 0x2000, 5};
  EXPECT_THROW((void)make_acpi_tables({.vcpus = 1, .devices = {&wraps, 1}}, kAcpiAddress),
               base::Error);
}

// What iasl makes of a table; empty where it is not installed.
std::string disassembled(const Bytes& table) {
  char folder[] = "/tmp/minivmm-acpi-XXXXXX";
  if (::mkdtemp(folder) == nullptr) return {};
  const std::string base = std::string(folder) + "/table";
  std::ofstream(base + ".aml", std::ios::binary)
      .write(reinterpret_cast<const char*>(table.data()),
             static_cast<std::streamsize>(table.size()));
  const int status =
      std::system(("iasl -d -p " + base + " " + base + ".aml >" + base + ".log 2>&1").c_str());
  std::stringstream text;
  text << std::ifstream(base + ".dsl").rdbuf();
  std::filesystem::remove_all(folder);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 127) return {};
  EXPECT_EQ(status, 0) << "iasl refuses the table";
  return text.str();
}

TEST(Acpi, TheDisassemblerReadsWhatWasMeant) {
  if (std::system("command -v iasl >/dev/null 2>&1") != 0) GTEST_SKIP() << "no iasl (acpica-tools)";
  const auto devices = many_devices(2);
  const auto tables =
      walk(make_acpi_tables({.vcpus = 2, .devices = devices}, kAcpiAddress), kAcpiAddress);
  const std::string dsdt = disassembled(tables.at("DSDT"));
  for (const char* part :
       {"Device (COM1)", "EisaId (\"PNP0501\")", "0x03F8,", "IRQNoFlags ()", "{4}", "Device (V000)",
        "Device (V001)", "\"LNRO0005\"", "Memory32Fixed (ReadWrite,", "0xD0001000,",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive", "0x00000006,",
        "Name (_S5, Package (0x04)"}) {
    EXPECT_NE(dsdt.find(part), std::string::npos) << part << " is missing in\n" << dsdt;
  }
  const std::string fadt = disassembled(tables.at("FACP"));
  EXPECT_NE(fadt.find("Hardware Reduced (V5) : 1"), std::string::npos) << fadt;
  EXPECT_NE(fadt.find("Reset Register Supported (V2) : 1"), std::string::npos) << fadt;
  const std::string madt = disassembled(tables.at("APIC"));
  EXPECT_NE(madt.find("[I/O APIC]"), std::string::npos) << madt;
}

TEST(MpTable, CountsItsEntriesAndAddsUpToZero) {
  const Bytes all = make_mp_table(2, kMpTableAddress);
  ASSERT_EQ(std::memcmp(all.data(), "_MP_", 4), 0);
  EXPECT_EQ(sum(std::span(all).first(16)), 0);
  EXPECT_EQ(load_le<uint32_t>(&all[4]), kMpTableAddress + 16);
  const auto table = std::span(all).subspan(16);
  ASSERT_EQ(std::memcmp(table.data(), "PCMP", 4), 0);
  ASSERT_EQ(load_le<uint16_t>(&table[4]), table.size());
  EXPECT_EQ(sum(table), 0);
  // Entries as a kernel walks them.
  size_t at = 44;
  unsigned processors = 0, interrupts = 0, entries = 0;
  for (; at < table.size(); ++entries) {
    const int type = std::to_integer<int>(table[at]);
    processors += type == 0 ? 1 : 0;
    if (type == 3) {
      EXPECT_EQ(table[at + 5], table[at + 7]) << "a line is its pin";
      EXPECT_EQ(table[at + 6], std::byte{2}) << "the IOAPIC's id";
      ++interrupts;
    }
    at += type == 0 ? 20 : 8;
  }
  EXPECT_EQ(at, table.size());
  EXPECT_EQ(entries, load_le<uint16_t>(&table[34]));
  EXPECT_EQ(processors, 2u);
  EXPECT_EQ(interrupts, kIoapicPins);
}

}  // namespace
}  // namespace minivmm::vmm
