// SPDX-License-Identifier: Apache-2.0
// Memory for rings and buffers: handed out from the front of the largest RAM range, given back only
// all at once, by a job that ends.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minivmm::probe {

class Arena {
 public:
  // `start_info` is the guest address of the PVH structure.
  static void start(uint64_t start_info);
  // Zeroed and aligned to `alignment`, or nullptr.
  static void* allocate(uint64_t bytes, uint64_t alignment = 4096);
  static uint64_t available();

  // Gives back what was allocated during its life.
  class Scope {
   public:
    Scope();
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    uint64_t mark_;
  };
};

// Of the PVH structure: the command line, zero-terminated; empty if there is none.
const char* boot_command_line(uint64_t start_info);

}  // namespace minivmm::probe
