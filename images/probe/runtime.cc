// SPDX-License-Identifier: Apache-2.0
// What the compiler calls without being asked.
#include <cstddef>
#include <cstdint>

extern "C" {

void* memcpy(void* to, const void* from, size_t count) {
  void* const result = to;
  size_t words = count / 8;
  size_t rest = count % 8;
  asm volatile("rep movsq\n\tmovq %3, %%rcx\n\trep movsb"
               : "+D"(to), "+S"(from), "+c"(words)
               : "r"(rest)
               : "memory");
  return result;
}

void* memset(void* to, int value, size_t count) {
  void* const result = to;
  size_t words = count / 8;
  size_t rest = count % 8;
  const uint64_t pattern = 0x0101010101010101 * static_cast<uint8_t>(value);
  asm volatile("rep stosq\n\tmovq %3, %%rcx\n\trep stosb"
               : "+D"(to), "+c"(words)
               : "a"(pattern), "r"(rest)
               : "memory");
  return result;
}

void* memmove(void* to, const void* from, size_t count) {
  auto* out = static_cast<uint8_t*>(to);
  const auto* in = static_cast<const uint8_t*>(from);
  if (out <= in || out >= in + count) return memcpy(to, from, count);
  for (size_t i = count; i-- > 0;) {
    out[i] = in[i];
    asm volatile("" : : : "memory");  // or the compiler turns the loop into a call of itself
  }
  return to;
}

int memcmp(const void* a, const void* b, size_t count) {
  const auto* x = static_cast<const uint8_t*>(a);
  const auto* y = static_cast<const uint8_t*>(b);
  for (size_t i = 0; i < count; ++i) {
    if (x[i] != y[i]) return x[i] < y[i] ? -1 : 1;
  }
  return 0;
}

size_t strlen(const char* text) {
  size_t n = 0;
  while (text[n] != 0) {
    ++n;
    asm volatile("" : : : "memory");
  }
  return n;
}

}  // extern "C"
