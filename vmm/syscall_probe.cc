// SPDX-License-Identifier: Apache-2.0
#include "vmm/syscall_probe.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <span>
#include <thread>

#include "base/bytes.h"
#include "base/error.h"
#include "vmm/kick.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

// Guest physical = virtual addresses. All pages are user pages: privilege is not what is tested.
constexpr uint64_t kRam = 0x10000;
constexpr uint64_t kPml4 = 0x1000;
constexpr uint64_t kPdpt = 0x2000;
constexpr uint64_t kPd = 0x3000;
constexpr uint64_t kGdt = 0x4000;
constexpr uint64_t kTss = 0x4100;
constexpr uint64_t kIdt = 0x5000;
constexpr uint64_t kFrame = 0x6f00;  // what the first iretq pops
constexpr uint64_t kKernelStack = 0x7f00;
constexpr uint64_t kUserStack = 0x8f00;
constexpr uint64_t kEntry = 0x9000;
constexpr uint64_t kProgram = 0x9100;
constexpr uint64_t kSyscallTarget = 0x9200;
constexpr uint64_t kFaultTarget = 0x9300;

constexpr uint16_t kKernelCode = 0x10;
constexpr uint16_t kUserData = 0x2b;
constexpr uint16_t kUserCode = 0x33;
constexpr uint16_t kTssSelector = 0x38;
constexpr uint16_t kPort = 0xf5;
constexpr uint8_t kWorked = kKernelCode;
constexpr uint8_t kFaulted = 0xff;

// iretq
constexpr uint8_t kEntryCode[] = {0x48, 0xcf};
// syscall; ud2
constexpr uint8_t kProgramCode[] = {0x0f, 0x05, 0x0f, 0x0b};
// mov %cs, %eax; out %al, $0xf5; hlt.  Reports the privilege that `syscall` led to: the broken one
// jumps here but stays at CPL 3.
constexpr uint8_t kSyscallCode[] = {0x8c, 0xc8, 0xe6, kPort, 0xf4};
// mov $0xff, %al; out %al, $0xf5; hlt
constexpr uint8_t kFaultCode[] = {0xb0, kFaulted, 0xe6, kPort, 0xf4};

class Mapping {
 public:
  Mapping(size_t size, int flags, int fd) : size_(size) {
    data_ = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (data_ == MAP_FAILED) throw base::errno_error(errno, "KVM test guest: cannot map memory");
  }
  ~Mapping() { ::munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_;
  size_t size_;
};

void fill_tables(std::byte* ram) {
  constexpr uint64_t kPresentWritableUser = 7;
  const auto put64 = [ram](uint64_t at, uint64_t value) {
    base::store_le<uint64_t>(ram + at, value);
  };
  put64(kPml4, kPdpt | kPresentWritableUser);
  put64(kPdpt, kPd | kPresentWritableUser);
  put64(kPd, 0x80 | kPresentWritableUser);
  put64(kGdt + kKernelCode, 0x00af9b000000ffff);
  put64(kGdt + 0x18, 0x00cf93000000ffff);
  put64(kGdt + (kUserData & ~7), 0x00cff3000000ffff);
  put64(kGdt + (kUserCode & ~7), 0x00affb000000ffff);
  put64(kGdt + kTssSelector, 0x67 | (kTss << 16) | (uint64_t{0x89} << 40));
  put64(kTss + 4, kKernelStack);
  for (uint64_t vector = 0; vector < 32; ++vector) {
    put64(kIdt + vector * 16,
          (kFaultTarget & 0xffff) | (uint64_t{kKernelCode} << 16) | (uint64_t{0x8e00} << 32));
  }
  put64(kFrame, kProgram);
  put64(kFrame + 8, kUserCode);
  put64(kFrame + 16, 2);
  put64(kFrame + 24, kUserStack);
  put64(kFrame + 32, kUserData);
  const auto put_code = [ram](uint64_t at, std::span<const uint8_t> code) {
    std::memcpy(ram + at, code.data(), code.size());
  };
  put_code(kEntry, kEntryCode);
  put_code(kProgram, kProgramCode);
  put_code(kSyscallTarget, kSyscallCode);
  put_code(kFaultTarget, kFaultCode);
}

kvm_segment flat(uint16_t selector, uint8_t type, bool code) {
  kvm_segment out{};
  out.selector = selector;
  out.limit = 0xffffffff;
  out.type = type;
  out.present = 1;
  out.s = 1;
  out.g = 1;
  out.l = code ? 1 : 0;
  out.db = code ? 0 : 1;
  return out;
}

void set_registers(int vcpu) {
  kvm_sregs sregs{};
  kvm_ioctl_checked(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
  sregs.cs = flat(kKernelCode, 0xb, true);
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat(0x18, 0x3, false);
  sregs.tr = {};
  sregs.tr.base = kTss;
  sregs.tr.limit = 0x67;
  sregs.tr.selector = kTssSelector;
  sregs.tr.type = 0xb;
  sregs.tr.present = 1;
  sregs.gdt.base = kGdt;
  sregs.gdt.limit = kTssSelector + 15;
  sregs.idt.base = kIdt;
  sregs.idt.limit = 32 * 16 - 1;
  sregs.cr0 = 0x80000033;
  sregs.cr3 = kPml4;
  sregs.cr4 = 0x20;
  sregs.efer = 0x501;  // LMA LME SCE
  kvm_ioctl_checked(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
  // syscall takes CS from STAR[47:32].
  for (const auto& [index, value] :
       {std::pair<uint32_t, uint64_t>{0xc0000081,
                                      (uint64_t{0x23} << 48) | (uint64_t{kKernelCode} << 32)},
        {0xc0000082, kSyscallTarget},
        {0xc0000084, 0}}) {
    kvm_msr_entry entry{};
    entry.index = index;
    entry.data = value;
    KvmTable<kvm_msr_entry> table{std::span(&entry, 1)};
    kvm_ioctl_checked(vcpu, kSetMsrs, table.data(), "KVM_SET_MSRS");
  }
  kvm_regs regs{};
  regs.rip = kEntry;
  regs.rsp = kFrame;
  regs.rflags = 2;
  kvm_ioctl_checked(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

// What the guest reported, if it did within two seconds.
std::optional<uint8_t> run(int vcpu, kvm_run* area) {
  std::atomic<bool> stop{false};
  std::atomic<bool> done{false};
  std::optional<uint8_t> report;
  install_kick_handler();
  const ServiceThreadSignals signals;
  std::thread runner([&] {
    while (!stop.load()) {
      const int result = ::ioctl(vcpu, KVM_RUN, 0);
      if (result < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (result == 0 && area->exit_reason == KVM_EXIT_IO && area->io.port == kPort) {
        report = *(reinterpret_cast<const uint8_t*>(area) + area->io.data_offset);
      }
      break;
    }
    done.store(true);
  });
  for (int i = 0; i < 2000 && !done.load(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  stop.store(true);
  __atomic_store_n(&area->immediate_exit, uint8_t{1}, __ATOMIC_SEQ_CST);
  kick_thread(runner.native_handle());
  runner.join();
  return report;
}

}  // namespace

std::optional<bool> guest_syscall_works(const Kvm& kvm) {
  const base::UniqueFd vm = kvm.create_vm();
  const Mapping ram(kRam, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  fill_tables(ram.data());
  (void)kvm_ioctl_value(vm.get(), KVM_SET_TSS_ADDR, kTssAddress);
  kvm_userspace_memory_region region{};
  region.memory_size = kRam;
  region.userspace_addr = reinterpret_cast<uint64_t>(ram.data());
  kvm_ioctl_checked(vm.get(), KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
  const int fd = kvm_ioctl_value(vm.get(), KVM_CREATE_VCPU, 0);
  if (fd < 0) throw base::errno_error(errno, "KVM: cannot make a vCPU");
  const base::UniqueFd vcpu(fd);
  const Mapping area(kvm.vcpu_mapping_size(), MAP_SHARED, vcpu.get());
  const auto cpuid = kvm.supported_cpuid();
  KvmTable<kvm_cpuid_entry2> table{std::span(cpuid)};
  kvm_ioctl_checked(vcpu.get(), kSetCpuid2, table.data(), "KVM_SET_CPUID2");
  set_registers(vcpu.get());
  // SAFETY: the kernel keeps a kvm_run at the start of this mapping.
  const auto report = run(vcpu.get(), reinterpret_cast<kvm_run*>(area.data()));
  if (report == kWorked) return true;
  if (!report) return std::nullopt;
  return false;
}

}  // namespace minivmm::vmm
