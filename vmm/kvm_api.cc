// SPDX-License-Identifier: Apache-2.0
#include "vmm/kvm_api.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>

#include <cstring>

#include <fmt/format.h>

#include "base/error.h"

namespace minivmm::vmm {
namespace {

constexpr const char* kDevice = "/dev/kvm";
constexpr int kApiVersion = 12;

base::UniqueFd open_kvm() {
  base::UniqueFd fd(::open(kDevice, O_RDWR | O_CLOEXEC));
  if (fd) return fd;
  const int err = errno;
  switch (err) {
    case ENOENT:
      throw base::Error(err,
                        "/dev/kvm does not exist: load the kvm_intel or kvm_amd module, or "
                        "switch virtualization on in the firmware; without it no guest can "
                        "run, everything else works");
    case EACCES:
    case EPERM:
      throw base::Error(err,
                        "/dev/kvm: permission denied: run as a member of the group that owns "
                        "it (usually kvm)");
    case ENODEV:
    case ENXIO:
      throw base::Error(err, "/dev/kvm: no KVM module answers: load kvm_intel or kvm_amd");
    default:
      throw base::errno_error(err, "/dev/kvm: cannot open");
  }
}

}  // namespace

int kvm_ioctl(int fd, unsigned long request, const void* argument) noexcept {
  int result = 0;
  do {
    result = ::ioctl(fd, request, argument);
  } while (result < 0 && errno == EINTR);
  return result;
}

int kvm_ioctl_value(int fd, unsigned long request, unsigned long value) noexcept {
  int result = 0;
  do {
    result = ::ioctl(fd, request, value);
  } while (result < 0 && errno == EINTR);
  return result;
}

int kvm_ioctl_checked(int fd, unsigned long request, const void* argument, const char* what) {
  const int result = kvm_ioctl(fd, request, argument);
  if (result < 0) throw base::errno_error(errno, fmt::format("KVM: {} failed", what));
  return result;
}

Kvm::Kvm() : fd_(open_kvm()) {
  const int version = kvm_ioctl_value(fd_.get(), KVM_GET_API_VERSION, 0);
  if (version != kApiVersion) {
    throw base::Error(EOPNOTSUPP,
                      fmt::format("/dev/kvm: API version {}, {} is needed", version, kApiVersion));
  }
  const auto missing = missing_capabilities(fd_.get());
  if (!missing.empty()) {
    throw base::Error(EOPNOTSUPP, fmt::format("/dev/kvm: this kernel's KVM lacks {}; use a newer "
                                              "kernel",
                                              fmt::join(missing, ", ")));
  }
}

int Kvm::capability(int cap) const noexcept {
  const int value =
      kvm_ioctl_value(fd_.get(), KVM_CHECK_EXTENSION, static_cast<unsigned long>(cap));
  return value < 0 ? 0 : value;
}

std::vector<std::string> missing_capabilities(int fd) {
  struct Needed {
    unsigned long cap;
    const char* name;
  };
  constexpr Needed kNeeded[] = {
      {KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"},
      {KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"},
      {KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR"},
      {KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"},
      {KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"},
      {KVM_CAP_IRQFD, "KVM_CAP_IRQFD"},
      {KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"},
      {KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"},
  };
  std::vector<std::string> out;
  for (const auto& needed : kNeeded) {
    if (kvm_ioctl_value(fd, KVM_CHECK_EXTENSION, needed.cap) <= 0) out.emplace_back(needed.name);
  }
  return out;
}

size_t Kvm::vcpu_mapping_size() const {
  return static_cast<size_t>(
      kvm_ioctl_checked(fd_.get(), KVM_GET_VCPU_MMAP_SIZE, nullptr, "KVM_GET_VCPU_MMAP_SIZE"));
}

std::vector<kvm_cpuid_entry2> Kvm::supported_cpuid() const {
  // The kernel says E2BIG until the room is enough.
  for (uint32_t room = 128; room <= 1024; room *= 2) {
    KvmTable<kvm_cpuid_entry2> table(room);
    if (kvm_ioctl(fd_.get(), kGetSupportedCpuid, table.data()) == 0) return table.entries();
    if (errno != E2BIG) throw base::errno_error(errno, "KVM: KVM_GET_SUPPORTED_CPUID failed");
  }
  throw base::Error(E2BIG, "KVM: KVM_GET_SUPPORTED_CPUID has more than 1024 entries");
}

base::UniqueFd Kvm::create_vm() const {
  const int fd = kvm_ioctl_value(fd_.get(), KVM_CREATE_VM, 0);
  if (fd < 0) throw base::errno_error(errno, "KVM: cannot make a virtual machine");
  return base::UniqueFd(fd);
}

}  // namespace minivmm::vmm
