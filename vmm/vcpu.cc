// SPDX-License-Identifier: Apache-2.0
#include "vmm/vcpu.h"

#include <errno.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "vmm/completion.h"
#include "vmm/kick.h"
#include "vmm/processors.h"
#include "vmm/thread_filter.h"

namespace minivmm::vmm {
namespace {

void set_cpuid(int fd, const std::vector<kvm_cpuid_entry2>& entries) {
  KvmTable<kvm_cpuid_entry2> table{std::span(entries)};
  kvm_ioctl_checked(fd, kSetCpuid2, table.data(), "KVM_SET_CPUID2");
}

// Which of them exist differs between hosts, and the guest does without: KVM stops at the first
// that it does not know, and we go on behind it.
void set_msrs(int fd) {
  const std::vector<kvm_msr_entry> all = boot_msrs();
  for (std::span<const kvm_msr_entry> left = all; !left.empty();) {
    KvmTable<kvm_msr_entry> table{left};
    const auto set = static_cast<size_t>(std::max(kvm_ioctl(fd, kSetMsrs, table.data()), 0));
    if (set >= left.size()) return;
    base::log_debug("KVM: MSR {:#x} cannot be set", uint32_t{left[set].index});
    left = left.subspan(set + 1);
  }
}

}  // namespace

Vcpu::Vcpu(const Kvm& kvm, std::span<const kvm_cpuid_entry2> supported, int vm_fd, unsigned index,
           unsigned count, VcpuHost& host)
    : host_(host), index_(index) {
  const int fd = kvm_ioctl_value(vm_fd, KVM_CREATE_VCPU, index);
  if (fd < 0) throw base::errno_error(errno, fmt::format("KVM: cannot make vCPU {}", index));
  fd_.reset(fd);
  run_size_ = kvm.vcpu_mapping_size();
  void* mapping = ::mmap(nullptr, run_size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (mapping == MAP_FAILED) throw base::errno_error(errno, "KVM: cannot map a vCPU's run area");
  run_ = static_cast<kvm_run*>(mapping);
  try {
    configure(kvm, supported, count);
  } catch (...) {
    ::munmap(run_, run_size_);
    throw;
  }
}

Vcpu::~Vcpu() {
  join();
  ::munmap(run_, run_size_);
}

void Vcpu::configure(const Kvm& kvm, std::span<const kvm_cpuid_entry2> supported, unsigned count) {
  const int fd = fd_.get();
  CpuidInput input;
  input.apic_id = index_;
  input.vcpus = count;
  input.tsc_deadline = kvm.capability(KVM_CAP_TSC_DEADLINE_TIMER) != 0;
  const int khz =
      kvm.capability(KVM_CAP_GET_TSC_KHZ) != 0 ? kvm_ioctl_value(fd, KVM_GET_TSC_KHZ, 0) : 0;
  input.tsc_khz = khz > 0 ? static_cast<uint32_t>(khz) : 0;
  // CPUID first: it decides which MSRs exist.
  set_cpuid(fd, make_cpuid(supported, input));
  set_msrs(fd);
  kvm_fpu fpu{};
  fpu.fcw = 0x37f;
  fpu.mxcsr = 0x1f80;
  kvm_ioctl_checked(fd, KVM_SET_FPU, &fpu, "KVM_SET_FPU");
  kvm_lapic_state lapic{};
  kvm_ioctl_checked(fd, KVM_GET_LAPIC, &lapic, "KVM_GET_LAPIC");
  set_local_interrupts(lapic);
  kvm_ioctl_checked(fd, KVM_SET_LAPIC, &lapic, "KVM_SET_LAPIC");
}

void Vcpu::set_boot_state(const BootState& boot) {
  kvm_sregs sregs{};
  kvm_regs regs{};
  kvm_ioctl_checked(fd_.get(), KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
  enter_state(boot, sregs, regs);
  kvm_ioctl_checked(fd_.get(), KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
  kvm_ioctl_checked(fd_.get(), KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

void Vcpu::start(const std::string& thread_name, std::vector<unsigned> processors) {
  thread_ = std::thread([this, thread_name, processors = std::move(processors)] {
    // 15 characters is what the kernel keeps.
    ::pthread_setname_np(::pthread_self(), thread_name.substr(0, 15).c_str());
    run_on_processors(processors, thread_name);
    if (host_.confine_threads()) confine_thread(ThreadKind::kVcpu, thread_name);
    loop();
  });
}

void Vcpu::kick() noexcept {
  // The flag stops a KVM_RUN that has not begun yet, the signal one that has.
  __atomic_store_n(&run_->immediate_exit, uint8_t{1}, __ATOMIC_SEQ_CST);
  kick_thread(thread_.native_handle());
}

void Vcpu::join() {
  if (thread_.joinable()) thread_.join();
}

void Vcpu::loop() {
  bool kicked = false;
  for (;;) {
    if (kicked || host_.paused()) take_kick();
    kicked = false;
    if (host_.ending()) return;
    if (host_.paused()) continue;
    const int result = ::ioctl(fd_.get(), KVM_RUN, 0);
    counters_.exits.fetch_add(1, std::memory_order_relaxed);
    if (result < 0) {
      kicked = errno == EINTR;
      if (kicked || errno == EAGAIN) continue;
      const int err = errno;
      end(ExitKind::kInternalError,
          fmt::format("vCPU {}: KVM_RUN: {}\n{}", index_, base::errno_text(err), registers()));
      return;
    }
    if (!handle_exit()) return;
  }
}

// After a kick, whose cause may be gone again.
void Vcpu::take_kick() {
  const bool was_paused = host_.paused();
  if (was_paused) host_.wait_while_paused();
  // Before the causes are looked at again: a kick from now on stops the next KVM_RUN.
  __atomic_store_n(&run_->immediate_exit, uint8_t{0}, __ATOMIC_SEQ_CST);
  // The guest's watchdogs must not count the time that it was not there. A guest without kvmclock
  // has none to be told.
  if (was_paused) (void)kvm_ioctl(fd_.get(), KVM_KVMCLOCK_CTRL, nullptr);
}

// False where the vCPU cannot go on; the reason has been told.
bool Vcpu::handle_exit() {
  switch (run_->exit_reason) {
    case KVM_EXIT_IO:
      handle_io();
      return true;
    case KVM_EXIT_MMIO:
      handle_mmio();
      return true;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
      return true;
    case KVM_EXIT_SHUTDOWN:
      if (host_.triple_fault_is_reset()) {
        end(ExitKind::kReset, "the guest reset itself (triple fault)");
      } else {
        end(ExitKind::kCrash,
            fmt::format("the guest crashed: triple fault on vCPU {}\n{}", index_, registers()));
      }
      return false;
    case KVM_EXIT_SYSTEM_EVENT:
      if (run_->system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN) {
        end(ExitKind::kPowerOff, "the guest switched itself off");
      } else if (run_->system_event.type == KVM_SYSTEM_EVENT_RESET) {
        end(ExitKind::kReset, "the guest reset itself");
      } else {
        end(ExitKind::kCrash, "the guest reported a crash");
      }
      return false;
    case KVM_EXIT_INTERNAL_ERROR:
      return handle_internal_error();
    case KVM_EXIT_FAIL_ENTRY:
      end(ExitKind::kInternalError,
          fmt::format(
              "vCPU {}: the processor refused to enter the guest, hardware reason {:#x}\n{}",
              index_, uint64_t{run_->fail_entry.hardware_entry_failure_reason}, registers()));
      return false;
    default:
      end(ExitKind::kInternalError, fmt::format("vCPU {}: unexpected KVM exit {}\n{}", index_,
                                                uint32_t{run_->exit_reason}, registers()));
      return false;
  }
}

void Vcpu::handle_io() {
  const auto& io = run_->io;
  // SAFETY: KVM says where in the run area the data of this access lies.
  auto* data = reinterpret_cast<std::byte*>(run_) + io.data_offset;
  counters_.port_accesses.fetch_add(io.count, std::memory_order_relaxed);
  // A string instruction hands over several accesses to one port at once.
  for (uint32_t i = 0; i < io.count; ++i, data += io.size) {
    const std::span<std::byte> one(data, io.size);
    if (io.direction == KVM_EXIT_IO_OUT) {
      if (!host_.ports().write(io.port, one)) {
        counters_.unclaimed.fetch_add(1, std::memory_order_relaxed);
      }
    } else if (!host_.ports().read(io.port, one)) {
      std::fill(one.begin(), one.end(), std::byte{0xff});
      counters_.unclaimed.fetch_add(1, std::memory_order_relaxed);
    }
  }
}

void Vcpu::handle_mmio() {
  auto& mmio = run_->mmio;
  counters_.mmio_accesses.fetch_add(1, std::memory_order_relaxed);
  const std::span<std::byte> data(reinterpret_cast<std::byte*>(mmio.data),
                                  std::min<size_t>(mmio.len, sizeof mmio.data));
  if (mmio.is_write != 0) {
    if (!host_.mmio().write(mmio.phys_addr, data)) {
      counters_.unclaimed.fetch_add(1, std::memory_order_relaxed);
    }
  } else if (!host_.mmio().read(mmio.phys_addr, data)) {
    std::fill(data.begin(), data.end(), std::byte{0xff});
    counters_.unclaimed.fetch_add(1, std::memory_order_relaxed);
  }
}

bool Vcpu::handle_internal_error() {
  const virtio::GuestMemory* const memory = host_.completion_memory();
  if (memory != nullptr && complete_instruction(fd_.get(), *run_, *memory)) {
    counters_.completed.fetch_add(1, std::memory_order_relaxed);
    return true;
  }
  end(ExitKind::kInternalError, describe_internal_error());
  return false;
}

void Vcpu::end(ExitKind kind, std::string text) { host_.vcpu_ended({kind, 0, std::move(text)}); }

std::string Vcpu::describe_internal_error() const {
  const auto& internal = run_->internal;
  std::string text =
      fmt::format("vCPU {}: KVM internal error, suberror {}", index_, uint32_t{internal.suberror});
  if (internal.suberror == KVM_INTERNAL_ERROR_EMULATION && internal.ndata > 1) {
    // data[0] are flags, then a length byte and the instruction.
    const auto* bytes = reinterpret_cast<const uint8_t*>(&internal.data[1]);
    const size_t length = std::min<size_t>(bytes[0], 15);
    text += ": KVM's instruction emulator does not know:";
    for (size_t i = 1; i <= length; ++i) text += fmt::format(" {:02x}", bytes[i]);
    text += " (run check-host: this KVM may be one without hardware virtualization)";
  }
  return text + "\n" + registers();
}

std::string Vcpu::registers() const {
  kvm_regs r{};
  kvm_sregs s{};
  if (kvm_ioctl(fd_.get(), KVM_GET_REGS, &r) != 0 || kvm_ioctl(fd_.get(), KVM_GET_SREGS, &s) != 0) {
    return "registers cannot be read";
  }
  const auto u = [](auto value) { return static_cast<unsigned long long>(value); };
  return fmt::format(
      "rip {:016x} rsp {:016x} rfl {:08x} cs {:x} cpl {}\n"
      "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n"
      "rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}\n"
      "r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}\n"
      "r13 {:016x} r14 {:016x} r15 {:016x}\n"
      "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:x}",
      u(r.rip), u(r.rsp), u(r.rflags), s.cs.selector, s.ss.dpl, u(r.rax), u(r.rbx), u(r.rcx),
      u(r.rdx), u(r.rsi), u(r.rdi), u(r.rbp), u(r.r8), u(r.r9), u(r.r10), u(r.r11), u(r.r12),
      u(r.r13), u(r.r14), u(r.r15), u(s.cr0), u(s.cr2), u(s.cr3), u(s.cr4), u(s.efer));
}

}  // namespace minivmm::vmm
