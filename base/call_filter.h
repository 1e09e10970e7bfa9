// SPDX-License-Identifier: Apache-2.0
// What a thread may ask of the system: a seccomp filter, for the rest of the thread's life, which
// the threads that it makes inherit. Anything else fails with EPERM, so that a case nobody thought
// of is an error and not the end.
//
// A thread with a filter can still be made to write to the memory of one without: this closes the
// short ways out, it is not a sandbox.
#pragma once

#include <linux/filter.h>
#include <string>

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace minivmm::base {

class CallFilter {
 public:
  // Allows what every thread does: read and write what is open, lock, take memory, look at clocks,
  // signal its process, end.
  CallFilter();

  // False in builds with sanitizers, whose runtimes open files in the middle of everything: there a
  // filter has no effect.
  static bool in_effect() noexcept;

  CallFilter& allow(std::initializer_list<unsigned> calls);
  // ioctl with requests of this type (bits 8 to 15 of the request).
  CallFilter& allow_requests(uint8_t type);
  // Threads, which get this filter too; not processes.
  CallFilter& allow_threads();

  // Filters the calling thread; once. Where the system has no filters, that is said.
  void apply(const std::string& thread) noexcept;

 private:
  void add(int code, uint32_t value, uint8_t yes, uint8_t no);
  void end(uint32_t action);
  // Goes on behind the next `length` instructions where the loaded value is another.
  void skip_unless(uint32_t value, uint8_t length);
  void load(uint32_t offset);

  // In place: a thread that needs no memory of the allocator's starts sooner.
  std::array<sock_filter, 224> code_;
  size_t length_ = 0;
};

}  // namespace minivmm::base
