// SPDX-License-Identifier: Apache-2.0
#include "vmm/completion.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <span>

#include "vmm/emulate/execute.h"
#include "vmm/kvm_api.h"

namespace minivmm::vmm {
namespace {

class VcpuFloatingPoint final : public emulate::FloatingPoint {
 public:
  explicit VcpuFloatingPoint(int fd) : fd_(fd) {}
  kvm_fpu load() override {
    kvm_fpu state{};
    kvm_ioctl_checked(fd_, KVM_GET_FPU, &state, "KVM_GET_FPU");
    return state;
  }
  void store(const kvm_fpu& state) override {
    kvm_ioctl_checked(fd_, KVM_SET_FPU, &state, "KVM_SET_FPU");
  }

 private:
  const int fd_;
};

void raise(int fd, emulate::Cpu& cpu, const emulate::Exception& exception) {
  if (exception.vector == emulate::kPageFaultVector) {
    cpu.sregs.cr2 = exception.address;
    kvm_ioctl_checked(fd, KVM_SET_SREGS, &cpu.sregs, "KVM_SET_SREGS");
  }
  kvm_vcpu_events events{};
  kvm_ioctl_checked(fd, KVM_GET_VCPU_EVENTS, &events, "KVM_GET_VCPU_EVENTS");
  events.exception.injected = 1;
  events.exception.nr = exception.vector;
  events.exception.has_error_code = exception.error_code.has_value() ? 1 : 0;
  events.exception.error_code = exception.error_code.value_or(0);
  events.interrupt.shadow = 0;
  kvm_ioctl_checked(fd, KVM_SET_VCPU_EVENTS, &events, "KVM_SET_VCPU_EVENTS");
}

// The instruction as KVM fetched it; empty if it does not say.
std::span<const uint8_t> failed_bytes(const kvm_run& run) {
  constexpr uint64_t kBytesAreThere = 1;  // flag of KVM_INTERNAL_ERROR_EMULATION
  const auto& internal = run.internal;
  if (internal.suberror != KVM_INTERNAL_ERROR_EMULATION || internal.ndata < 3 ||
      (internal.data[0] & kBytesAreThere) == 0) {
    return {};
  }
  // SAFETY: a length and 15 bytes stand where the second and third number are.
  const auto* bytes = reinterpret_cast<const uint8_t*>(&internal.data[1]);
  return {bytes + 1, std::min<size_t>(bytes[0], 15)};
}

}  // namespace

bool complete_instruction(int vcpu_fd, const kvm_run& run,
                          const virtio::GuestMemory& memory) noexcept {
  try {
    const std::span<const uint8_t> bytes = failed_bytes(run);
    if (bytes.empty()) return false;
    VcpuFloatingPoint floating_point(vcpu_fd);
    emulate::Cpu cpu{.floating_point = floating_point, .memory = memory};
    kvm_ioctl_checked(vcpu_fd, KVM_GET_REGS, &cpu.regs, "KVM_GET_REGS");
    kvm_ioctl_checked(vcpu_fd, KVM_GET_SREGS, &cpu.sregs, "KVM_GET_SREGS");
    emulate::Exception exception;
    const emulate::Outcome outcome = emulate::execute(cpu, bytes, exception);
    if (outcome == emulate::Outcome::kUnknown) return false;
    kvm_ioctl_checked(vcpu_fd, KVM_SET_REGS, &cpu.regs, "KVM_SET_REGS");
    if (outcome == emulate::Outcome::kException) raise(vcpu_fd, cpu, exception);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace minivmm::vmm
