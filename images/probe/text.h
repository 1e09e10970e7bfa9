// SPDX-License-Identifier: Apache-2.0
// Text without a library: one line being built, and numbers read from text.
#pragma once

#include <cstddef>
#include <cstdint>

#include "string_view.h"

namespace minivmm::probe {

// What does not fit is cut off.
class Line {
 public:
  Line& text(StringView text);
  Line& number(uint64_t value);
  Line& hex(uint64_t value);  // 0x...
  Line& hex_bytes(const uint8_t* bytes, size_t count);
  Line& fixed(uint64_t hundredths);            // 123 -> 1.23
  Line& key(StringView name, uint64_t value);  // " name=value"
  Line& key(StringView name, StringView value);
  Line& printable(const char* bytes, size_t count);  // up to a zero; odd bytes as dots
  StringView view() const { return {buffer_, size_}; }
  size_t size() const { return size_; }

 private:
  void put(char c);
  static constexpr size_t kMax = 1000;
  char buffer_[kMax];
  size_t size_ = 0;
};

// Writes the line and a line feed to the serial port, in one go.
void print(Line& line);

// Decimal or 0x hexadecimal, with an optional suffix K, M, G or T (powers of 1024). False for
// anything else.
bool parse_number(StringView text, uint64_t* out);

// Cuts the next word off `text`; words are separated by any of `separators`. Empty at the end.
StringView next_word(StringView& text, StringView separators);

}  // namespace minivmm::probe
