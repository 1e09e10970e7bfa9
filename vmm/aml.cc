// SPDX-License-Identifier: Apache-2.0
#include "vmm/aml.h"

#include <errno.h>
#include <string>

#include <algorithm>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::vmm::aml {
namespace {

constexpr uint8_t kZeroOp = 0x00;
constexpr uint8_t kOneOp = 0x01;
constexpr uint8_t kNameOp = 0x08;
constexpr uint8_t kBytePrefix = 0x0a;
constexpr uint8_t kWordPrefix = 0x0b;
constexpr uint8_t kDWordPrefix = 0x0c;
constexpr uint8_t kStringPrefix = 0x0d;
constexpr uint8_t kQWordPrefix = 0x0e;
constexpr uint8_t kScopeOp = 0x10;
constexpr uint8_t kBufferOp = 0x11;
constexpr uint8_t kPackageOp = 0x12;
constexpr uint8_t kExtOpPrefix = 0x5b;
constexpr uint8_t kDeviceOp = 0x82;
constexpr uint8_t kEndTag = 0x79;

void put(Bytes& out, std::initializer_list<uint8_t> values) {
  for (const uint8_t value : values) out.push_back(static_cast<std::byte>(value));
}

void put_le(Bytes& out, uint64_t value, unsigned bytes) {
  for (unsigned i = 0; i < bytes; ++i) out.push_back(static_cast<std::byte>(value >> (8 * i)));
}

void append(Bytes& out, const Bytes& more) { out.insert(out.end(), more.begin(), more.end()); }

// PkgLength counts itself. One byte holds 6 bits; in 2 to 4 bytes the first holds the low 4 bits
// and how many follow.
void put_package_length(Bytes& out, size_t content) {
  if (content + 1 < 0x40) return put_le(out, content + 1, 1);
  for (unsigned more = 1; more <= 3; ++more) {
    const size_t total = content + 1 + more;
    if (total >= size_t{1} << (4 + 8 * more)) continue;
    put(out, {static_cast<uint8_t>((more << 6) | (total & 0xf))});
    return put_le(out, total >> 4, more);
  }
  throw base::Error(EINVAL, fmt::format("AML: a term of {} bytes is too long", content));
}

void put_name(Bytes& out, std::string_view name) {
  const auto lead = [](char c) { return (c >= 'A' && c <= 'Z') || c == '_'; };
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  if (name.size() != 4 || !lead(name[0]) ||
      !std::all_of(name.begin(), name.end(), [&](char c) { return lead(c) || digit(c); })) {
    throw base::Error(EINVAL, fmt::format("AML: '{}' is not a name", name));
  }
  for (const char c : name) put(out, {static_cast<uint8_t>(c)});
}

Bytes with_length(std::initializer_list<uint8_t> opcode, const Bytes& content) {
  Bytes out;
  put(out, opcode);
  put_package_length(out, content.size());
  append(out, content);
  return out;
}

unsigned hex_digit(char c) {
  if (c >= '0' && c <= '9') return static_cast<unsigned>(c - '0');
  if (c >= 'A' && c <= 'F') return static_cast<unsigned>(c - 'A' + 10);
  throw base::Error(EINVAL, fmt::format("AML: '{}' is not a hexadecimal digit", c));
}

}  // namespace

Bytes concat(std::initializer_list<Bytes> parts) {
  Bytes out;
  for (const Bytes& part : parts) append(out, part);
  return out;
}

Bytes integer(uint64_t value) {
  Bytes out;
  if (value <= 1) {
    put(out, {value == 0 ? kZeroOp : kOneOp});
  } else if (value <= 0xff) {
    put(out, {kBytePrefix});
    put_le(out, value, 1);
  } else if (value <= 0xffff) {
    put(out, {kWordPrefix});
    put_le(out, value, 2);
  } else if (value <= 0xffffffff) {
    put(out, {kDWordPrefix});
    put_le(out, value, 4);
  } else {
    put(out, {kQWordPrefix});
    put_le(out, value, 8);
  }
  return out;
}

Bytes string(std::string_view text) {
  Bytes out;
  put(out, {kStringPrefix});
  for (const char c : text) {
    if (c <= 0) throw base::Error(EINVAL, "AML: a string holds ASCII only");
    put(out, {static_cast<uint8_t>(c)});
  }
  put(out, {0});
  return out;
}

Bytes eisa_id(std::string_view id) {
  if (id.size() != 7) throw base::Error(EINVAL, fmt::format("AML: '{}' is not an EISA id", id));
  uint32_t value = 0;
  for (const char c : id.substr(0, 3)) {
    if (c < 'A' || c > 'Z') {
      throw base::Error(EINVAL, fmt::format("AML: '{}' is not an EISA id", id));
    }
    value = (value << 5) | static_cast<uint32_t>(c - 'A' + 1);
  }
  for (const char c : id.substr(3)) value = (value << 4) | hex_digit(c);
  // Stored with its bytes reversed.
  Bytes out;
  put(out, {kDWordPrefix});
  put_le(out, __builtin_bswap32(value), 4);
  return out;
}

Bytes package(std::initializer_list<Bytes> elements) {
  Bytes content;
  put(content, {static_cast<uint8_t>(elements.size())});
  for (const Bytes& element : elements) append(content, element);
  return with_length({kPackageOp}, content);
}

Bytes name(std::string_view name, const Bytes& value) {
  Bytes out;
  put(out, {kNameOp});
  put_name(out, name);
  append(out, value);
  return out;
}

Bytes device(std::string_view name, const Bytes& body) {
  Bytes content;
  put_name(content, name);
  append(content, body);
  return with_length({kExtOpPrefix, kDeviceOp}, content);
}

Bytes root_scope(std::string_view name, const Bytes& body) {
  Bytes content;
  put(content, {'\\'});
  put_name(content, name);
  append(content, body);
  return with_length({kScopeOp}, content);
}

Bytes resource_template(std::initializer_list<Bytes> descriptors) {
  Bytes list = concat(descriptors);
  put(list, {kEndTag, 0});  // a checksum of zero counts as right
  return with_length({kBufferOp}, concat({integer(list.size()), list}));
}

Bytes io_ports(uint16_t base, uint8_t length) {
  Bytes out;
  put(out, {0x47, 0x01});  // decodes 16 bits
  put_le(out, base, 2);    // lowest
  put_le(out, base, 2);    // highest
  put(out, {1, length});   // alignment
  return out;
}

Bytes isa_irq(unsigned line) {
  if (line > 15) throw base::Error(EINVAL, fmt::format("AML: there is no ISA line {}", line));
  Bytes out;
  put(out, {0x22});
  put_le(out, uint64_t{1} << line, 2);
  return out;
}

Bytes memory32_fixed(uint32_t base, uint32_t size) {
  Bytes out;
  put(out, {0x86, 9, 0, 1});  // 9 bytes follow; read and write
  put_le(out, base, 4);
  put_le(out, size, 4);
  return out;
}

Bytes interrupt(uint32_t gsi) {
  Bytes out;
  put(out, {0x89, 6, 0, 0x03, 1});  // 6 bytes follow; consumer and edge; one line
  put_le(out, gsi, 4);
  return out;
}

}  // namespace minivmm::vmm::aml
