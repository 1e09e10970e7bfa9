// SPDX-License-Identifier: Apache-2.0
// /dev/kvm: opened, checked, and its system-wide questions. Every ioctl of the program on KVM
// descriptors goes through here, vcpu.cc and machine.cc.
#pragma once

#include <linux/kvm.h>
#include <string>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/unique_fd.h"

namespace minivmm::vmm {

// ioctl that retries EINTR. Returns what ioctl returned; -1 leaves errno.
int kvm_ioctl(int fd, unsigned long request, const void* argument = nullptr) noexcept;
int kvm_ioctl_value(int fd, unsigned long request, unsigned long value) noexcept;
// Throws base::Error naming `what`.
int kvm_ioctl_checked(int fd, unsigned long request, const void* argument, const char* what);

// Calls with a table behind a header of {u32 count, u32 padding}. Declared here because several
// versions of linux/kvm.h give these structures another size in C++ than in C, and with it another
// request number.
inline constexpr unsigned long kGetSupportedCpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0x05, 8);
inline constexpr unsigned long kSetCpuid2 = _IOC(_IOC_WRITE, KVMIO, 0x90, 8);
inline constexpr unsigned long kSetMsrs = _IOC(_IOC_WRITE, KVMIO, 0x89, 8);

template <typename Entry>
class KvmTable {
 public:
  explicit KvmTable(size_t count) : bytes_(kHeader + count * sizeof(Entry)) {
    const auto n = static_cast<uint32_t>(count);
    std::memcpy(bytes_.data(), &n, sizeof n);
  }
  explicit KvmTable(std::span<const Entry> entries) : KvmTable(entries.size()) {
    std::memcpy(bytes_.data() + kHeader, entries.data(), entries.size_bytes());
  }
  void* data() noexcept { return bytes_.data(); }
  // As many as KVM says there are.
  std::vector<Entry> entries() const {
    uint32_t count = 0;
    std::memcpy(&count, bytes_.data(), sizeof count);
    std::vector<Entry> out(std::min<size_t>(count, (bytes_.size() - kHeader) / sizeof(Entry)));
    std::memcpy(out.data(), bytes_.data() + kHeader, out.size() * sizeof(Entry));
    return out;
  }

 private:
  static constexpr size_t kHeader = 8;
  std::vector<std::byte> bytes_;
};

// Names of the capabilities a Machine needs and the KVM behind `fd` (of /dev/kvm) lacks.
std::vector<std::string> missing_capabilities(int fd);

class Kvm {
 public:
  // Opens /dev/kvm and checks the version and what a Machine needs. Throws base::Error that says
  // what to do.
  Kvm();

  int fd() const noexcept { return fd_.get(); }
  // Value of a KVM_CAP_*; 0 where it is not there.
  int capability(int cap) const noexcept;
  size_t vcpu_mapping_size() const;
  std::vector<kvm_cpuid_entry2> supported_cpuid() const;
  base::UniqueFd create_vm() const;

 private:
  base::UniqueFd fd_;
};

}  // namespace minivmm::vmm
