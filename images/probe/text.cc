// SPDX-License-Identifier: Apache-2.0
#include "text.h"

#include "arch.h"

namespace minivmm::probe {

void Line::put(char c) {
  // One place stays free for print()'s line feed.
  if (size_ < kMax - 1) buffer_[size_++] = c;
}

Line& Line::text(StringView text) {
  for (const char c : text) put(c);
  return *this;
}

Line& Line::number(uint64_t value) {
  char digits[20];
  int n = 0;
  do {
    digits[n++] = static_cast<char>('0' + value % 10);
    value /= 10;
  } while (value != 0);
  while (n > 0) put(digits[--n]);
  return *this;
}

Line& Line::hex(uint64_t value) {
  text("0x");
  int shift = 60;
  while (shift > 0 && (value >> shift) == 0) shift -= 4;
  for (; shift >= 0; shift -= 4) put("0123456789abcdef"[(value >> shift) & 15]);
  return *this;
}

Line& Line::hex_bytes(const uint8_t* bytes, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    put("0123456789abcdef"[bytes[i] >> 4]);
    put("0123456789abcdef"[bytes[i] & 15]);
  }
  return *this;
}

Line& Line::fixed(uint64_t hundredths) {
  number(hundredths / 100).text(".");
  put(static_cast<char>('0' + hundredths / 10 % 10));
  put(static_cast<char>('0' + hundredths % 10));
  return *this;
}

Line& Line::key(StringView name, uint64_t value) {
  return text(" ").text(name).text("=").number(value);
}

Line& Line::key(StringView name, StringView value) {
  return text(" ").text(name).text("=").text(value);
}

Line& Line::printable(const char* bytes, size_t count) {
  for (size_t i = 0; i < count && bytes[i] != 0; ++i) {
    put(bytes[i] >= ' ' && bytes[i] <= '~' ? bytes[i] : '.');
  }
  return *this;
}

void print(Line& line) {
  // put() keeps room for this one.
  const_cast<char*>(line.view().data())[line.size()] = '\n';
  serial_write({line.view().data(), line.size() + 1});
}

bool parse_number(StringView text, uint64_t* out) {
  uint64_t value = 0;
  uint64_t base = 10;
  if (text.size() > 2 && text[0] == '0' && (text[1] == 'x' || text[1] == 'X')) {
    base = 16;
    text.remove_prefix(2);
  }
  bool digits = false;
  while (!text.empty()) {
    const char c = text.front();
    uint64_t digit = 0;
    if (c >= '0' && c <= '9') {
      digit = static_cast<uint64_t>(c - '0');
    } else if (base == 16 && c >= 'a' && c <= 'f') {
      digit = static_cast<uint64_t>(c - 'a' + 10);
    } else if (base == 16 && c >= 'A' && c <= 'F') {
      digit = static_cast<uint64_t>(c - 'A' + 10);
    } else {
      break;
    }
    if (__builtin_mul_overflow(value, base, &value) ||
        __builtin_add_overflow(value, digit, &value)) {
      return false;
    }
    digits = true;
    text.remove_prefix(1);
  }
  if (!digits) return false;
  if (text.size() == 1) {
    const StringView suffixes = "KMGT";
    const size_t at = suffixes.find(text.front());
    if (at == StringView::npos) return false;
    if (__builtin_mul_overflow(value, uint64_t{1} << (10 * (at + 1)), &value)) return false;
    text.remove_prefix(1);
  }
  *out = value;
  return text.empty();
}

StringView next_word(StringView& text, StringView separators) {
  while (!text.empty() && separators.find(text.front()) != StringView::npos) {
    text.remove_prefix(1);
  }
  size_t length = 0;
  while (length < text.size() && separators.find(text[length]) == StringView::npos) ++length;
  const StringView word(text.data(), length);
  text.remove_prefix(length);
  return word;
}

}  // namespace minivmm::probe
