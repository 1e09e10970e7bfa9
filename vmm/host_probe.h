// SPDX-License-Identifier: Apache-2.0
// What this host's KVM offers, for a user who wants to know why a guest does not run. Facts and a
// text each; prints nothing. Any thread; takes some milliseconds, because it runs a tiny guest.
#pragma once

#include <string>
#include <string_view>

#include <optional>
#include <vector>

namespace minivmm::vmm {

enum class KvmKind {
  kNone,             // no guest can run; `problem` and `advice` say why and what to do
  kHardware,         // VT-x or AMD-V, also nested: every guest runs
  kWithoutHardware,  // page-table based: the probe guest runs, a Linux user space does not
};

struct HostProbe {
  KvmKind kind = KvmKind::kNone;
  bool device_exists = false;  // /dev/kvm
  bool device_opens = false;
  int api_version = 0;               // 12 is the only one in use
  std::string cpu_flag;              // "vmx", "svm" or empty
  std::vector<std::string> missing;  // KVM capabilities a machine needs and this KVM lacks
  int recommended_vcpus = 0;
  int max_vcpus = 0;
  // A guest program's `syscall` enters its kernel. Unset where it could not be tried.
  std::optional<bool> guest_syscalls;
  // Guests of this host could use KVM themselves. Unset where the module does not say.
  std::optional<bool> nested;
  std::string problem;  // empty if machines can be made
  std::string advice;   // what to do, or what to expect; empty if nothing
};

HostProbe probe_host();

// What a KVM that makes machines is. One whose guests' system calls do not work is page-table
// based, whatever the processor could do.
KvmKind kind_of(const std::string& cpu_flag, std::optional<bool> guest_syscalls) noexcept;

// Whether guests' kernels run on the processor itself. Quick where a module of the hardware's is
// loaded, else a tiny guest is asked. Throws base::Error where KVM cannot be used.
bool kvm_uses_hardware();

// What is put behind the command line of a Linux kernel where they do not: it keeps the kernel off
// instructions that KVM's emulator lacks and that would cost an exit each, or cannot be done at
// all.
std::string_view linux_arguments_without_hardware() noexcept;

std::string_view to_string(KvmKind kind) noexcept;

}  // namespace minivmm::vmm
