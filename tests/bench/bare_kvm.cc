// SPDX-License-Identifier: Apache-2.0
// bare_kvm: the least that runs a guest, as the physical limit for starting one: one page of
// memory, one virtual processor, one instruction that leaves the guest. Then it says "probe:" as
// the real guest does, and sleeps until it is killed. With --pc also what every machine like a PC
// has: interrupt controllers, CPUID, guest memory of 256 MiB.
#include <fcntl.h>
#include <linux/kvm.h>
#include <string_view>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kPcMemory = size_t{256} << 20;
constexpr uint32_t kCpuidRoom = 256;
// Of {u32 count, u32 padding, entries}: in C++ linux/kvm.h gives the structure another size, and
// the calls with it another number.
constexpr size_t kCpuidHead = 8;
constexpr unsigned long kGetSupportedCpuid = _IOC(_IOC_READ | _IOC_WRITE, KVMIO, 0x05, kCpuidHead);
constexpr unsigned long kSetCpuid2 = _IOC(_IOC_WRITE, KVMIO, 0x90, kCpuidHead);
// mov $0x3f8, %dx; mov $'p', %al; out %al, %dx; hlt
constexpr uint8_t kCode[] = {0xba, 0xf8, 0x03, 0xb0, 'p', 0xee, 0xf4};

int fail(const char* what) {
  std::fprintf(stderr, "bare_kvm: %s: %s\n", what, std::strerror(errno));
  return 1;
}

bool copy_cpuid(int kvm, int vcpu) {
  const auto table = std::make_unique<uint32_t[]>(
      (kCpuidHead + kCpuidRoom * sizeof(kvm_cpuid_entry2)) / sizeof(uint32_t));
  table[0] = kCpuidRoom;
  return ::ioctl(kvm, kGetSupportedCpuid, table.get()) == 0 &&
         ::ioctl(vcpu, kSetCpuid2, table.get()) == 0;
}

int run(bool pc) {
  const int kvm = ::open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (kvm < 0) return fail("/dev/kvm");
  const int vm = ::ioctl(kvm, KVM_CREATE_VM, 0);
  if (vm < 0) return fail("KVM_CREATE_VM");
  const size_t size = pc ? kPcMemory : kPage;
  void* const memory =
      ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return fail("mmap");
  std::memcpy(memory, kCode, sizeof kCode);
  kvm_userspace_memory_region region{};
  region.memory_size = size;
  region.userspace_addr = reinterpret_cast<uint64_t>(memory);
  if (::ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) != 0) return fail("memory");
  if (pc && ::ioctl(vm, KVM_CREATE_IRQCHIP, 0) != 0) return fail("KVM_CREATE_IRQCHIP");
  const int vcpu = ::ioctl(vm, KVM_CREATE_VCPU, 0);
  if (vcpu < 0) return fail("KVM_CREATE_VCPU");
  const auto run_size = static_cast<size_t>(::ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
  void* const area = ::mmap(nullptr, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  if (area == MAP_FAILED) return fail("mmap of the run area");
  if (pc && !copy_cpuid(kvm, vcpu)) return fail("CPUID");
  kvm_sregs sregs{};
  if (::ioctl(vcpu, KVM_GET_SREGS, &sregs) != 0) return fail("KVM_GET_SREGS");
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  kvm_regs regs{};
  regs.rflags = 2;
  if (::ioctl(vcpu, KVM_SET_SREGS, &sregs) != 0) return fail("KVM_SET_SREGS");
  if (::ioctl(vcpu, KVM_SET_REGS, &regs) != 0) return fail("KVM_SET_REGS");
  if (::ioctl(vcpu, KVM_RUN, 0) != 0) return fail("KVM_RUN");
  const auto* const exit = static_cast<const kvm_run*>(area);
  if (exit->exit_reason != KVM_EXIT_IO || exit->io.port != 0x3f8) {
    std::fprintf(stderr, "bare_kvm: exit %u\n", exit->exit_reason);
    return 1;
  }
  std::puts("probe: the least");
  std::fflush(stdout);
  for (;;) ::pause();
}

}  // namespace

int main(int argc, char** argv) {
  const bool pc = argc == 2 && std::string_view(argv[1]) == "--pc";
  if (argc > 2 || (argc == 2 && !pc)) {
    std::fputs("usage: bare_kvm [--pc]\n", stderr);
    return 2;
  }
  return run(pc);
}
