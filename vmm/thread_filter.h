// SPDX-License-Identifier: Apache-2.0
// What a thread that a guest can talk to may ask of the system: a seccomp filter, for the rest of
// the thread's life. Anything else fails with EPERM, so that a case nobody thought of does not end
// the guest.
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
