// SPDX-License-Identifier: Apache-2.0
// Writes ACPI Machine Language (ACPI 6.4, chapter 20): the few terms that describe our devices.
// Pure: each function returns the bytes of one term, terms are nested by passing them on. What a
// caller gets wrong (a name that is not four characters) throws base::Error(EINVAL).
#pragma once

#include <string_view>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace minivmm::vmm::aml {

using Bytes = std::vector<std::byte>;

Bytes concat(std::initializer_list<Bytes> parts);

// --- Data ---
Bytes integer(uint64_t value);
Bytes string(std::string_view text);
// "PNP0501": three letters and four hexadecimal digits in 32 bits.
Bytes eisa_id(std::string_view id);
Bytes package(std::initializer_list<Bytes> elements);

// --- Named objects; `name` has four characters of A-Z, 0-9 and _, the first not a digit ---
Bytes name(std::string_view name, const Bytes& value);
Bytes device(std::string_view name, const Bytes& body);
// `\NAME`.
Bytes root_scope(std::string_view name, const Bytes& body);

// --- Resources ---
Bytes resource_template(std::initializer_list<Bytes> descriptors);
// `length` ports at a fixed, 16-bit address.
Bytes io_ports(uint16_t base, uint8_t length);
// Legacy descriptor: an edge-triggered, active-high line below 16.
Bytes isa_irq(unsigned line);
Bytes memory32_fixed(uint32_t base, uint32_t size);
// Extended descriptor: consumer, edge-triggered, active-high, exclusive.
Bytes interrupt(uint32_t gsi);

}  // namespace minivmm::vmm::aml
