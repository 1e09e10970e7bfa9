// SPDX-License-Identifier: Apache-2.0
// What a thread that a guest can talk to may ask of the system (base/call_filter.h).
#pragma once

#include <string>

namespace minivmm::vmm {

enum class ThreadKind {
  kVcpu,    // KVM's ioctls, event descriptors
  kSerial,  // bytes through descriptors that are open, and clients of a listening socket
};

// Filters the calling thread. Both kinds may also lock, take memory, and read clocks. Without
// effect, which is said once, where the system has no filters, and in builds with sanitizers.
void confine_thread(ThreadKind kind, const std::string& thread) noexcept;

}  // namespace minivmm::vmm
