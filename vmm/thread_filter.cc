// SPDX-License-Identifier: Apache-2.0
#include "vmm/thread_filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <initializer_list>
#include <vector>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::vmm {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;  // its runtime opens files in the middle of everything
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#else
constexpr bool kSanitized = false;
#endif

constexpr std::initializer_list<unsigned> kEverybody = {SYS_read,
                                                        SYS_write,
                                                        SYS_writev,
                                                        SYS_futex,
                                                        SYS_mmap,
                                                        SYS_munmap,
                                                        SYS_mremap,
                                                        SYS_mprotect,
                                                        SYS_madvise,
                                                        SYS_brk,
                                                        SYS_rt_sigreturn,
                                                        SYS_rt_sigprocmask,
                                                        SYS_rt_sigaction,
                                                        SYS_exit,
                                                        SYS_exit_group,
                                                        SYS_clock_gettime,
                                                        SYS_gettimeofday,
                                                        SYS_nanosleep,
                                                        SYS_sched_yield,
                                                        SYS_clock_nanosleep,
                                                        SYS_getpid,
                                                        SYS_gettid,
                                                        SYS_tgkill,
                                                        SYS_poll,
                                                        SYS_ppoll,
                                                        SYS_getrandom,
                                                        SYS_sigaltstack,
                                                        SYS_restart_syscall,
                                                        SYS_sched_getaffinity};

constexpr std::initializer_list<unsigned> kSerialOnly = {SYS_recvfrom, SYS_sendto, SYS_accept4,
                                                         SYS_close};

constexpr uint32_t kNumber = offsetof(seccomp_data, nr);
constexpr uint32_t kArchitecture = offsetof(seccomp_data, arch);
constexpr uint32_t kRequestLow = offsetof(seccomp_data, args[1]);  // of an ioctl; little-endian

class Program {
 public:
  void load(uint32_t offset) { add(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0); }
  // Goes on with the next instruction where equal, else skips `otherwise` of them.
  void expect(uint32_t value, uint8_t otherwise) {
    add(BPF_JMP | BPF_JEQ | BPF_K, value, 0, otherwise);
  }
  void mask(uint32_t bits) { add(BPF_ALU | BPF_AND | BPF_K, bits, 0, 0); }
  void end(uint32_t action) { add(BPF_RET | BPF_K, action, 0, 0); }
  void allow(unsigned number) {
    expect(number, 1);
    end(SECCOMP_RET_ALLOW);
  }
  sock_fprog view() { return {static_cast<uint16_t>(code_.size()), code_.data()}; }

 private:
  void add(int code, uint32_t value, uint8_t yes, uint8_t no) {
    code_.push_back({static_cast<uint16_t>(code), yes, no, value});
  }
  std::vector<sock_filter> code_;
};

Program make_program(ThreadKind kind) {
  Program out;
  out.load(kArchitecture);
  out.expect(AUDIT_ARCH_X86_64, 1);
  out.load(kNumber);  // of another architecture's table it would mean something else: none matches
  for (const unsigned number : kEverybody) out.allow(number);
  if (kind == ThreadKind::kSerial) {
    for (const unsigned number : kSerialOnly) out.allow(number);
  } else {
    out.expect(SYS_ioctl, 4);
    out.load(kRequestLow);
    out.mask(0xff00);
    out.expect(KVMIO << 8, 1);
    out.end(SECCOMP_RET_ALLOW);
  }
  out.end(SECCOMP_RET_ERRNO | EPERM);
  return out;
}

}  // namespace

void confine_thread(ThreadKind kind, const std::string& thread) noexcept {
  if (kSanitized) return;
  try {
    Program program = make_program(kind);
    const sock_fprog code = program.view();
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
        ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &code, 0, 0) != 0) {
      base::log_warning("{}: runs without a filter of system calls: {}", thread,
                        base::errno_text(errno));
    }
  } catch (const std::exception& error) {
    base::log_warning("{}: runs without a filter of system calls: {}", thread, error.what());
  }
}

}  // namespace minivmm::vmm
