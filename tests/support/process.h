// SPDX-License-Identifier: Apache-2.0
// What this process holds, for tests of what must not grow.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>

namespace minivmm {

// False: a sanitizer's own memory is among it, and says nothing about the program's.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kMemoryIsOurs = false;
#else
inline constexpr bool kMemoryIsOurs = true;
#endif

inline uint64_t resident_mib() {
  std::ifstream file("/proc/self/statm");
  uint64_t all = 0, pages = 0;
  file >> all >> pages;
  return pages * static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) >> 20;
}

inline size_t descriptors() {
  const std::filesystem::directory_iterator begin("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin, {}));
}

}  // namespace minivmm
