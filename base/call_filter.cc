// SPDX-License-Identifier: Apache-2.0
#include "base/call_filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::base {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kSanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
#else
constexpr bool kSanitized = false;
#endif

constexpr uint32_t kNumber = offsetof(seccomp_data, nr);
constexpr uint32_t kArchitecture = offsetof(seccomp_data, arch);
// The low halves of arguments; little-endian.
constexpr uint32_t kFirstArgument = offsetof(seccomp_data, args[0]);
constexpr uint32_t kSecondArgument = offsetof(seccomp_data, args[1]);

constexpr std::initializer_list<unsigned> kEverybody = {SYS_read,
                                                        SYS_write,
                                                        SYS_readv,
                                                        SYS_writev,
                                                        SYS_futex,
                                                        SYS_mmap,
                                                        SYS_munmap,
                                                        SYS_mremap,
                                                        SYS_mprotect,
                                                        SYS_madvise,
                                                        SYS_mincore,
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
                                                        SYS_getpid,
                                                        SYS_gettid,
                                                        SYS_tgkill,
                                                        SYS_poll,
                                                        SYS_ppoll,
                                                        SYS_getrandom,
                                                        SYS_sigaltstack,
                                                        SYS_restart_syscall,
                                                        SYS_clock_nanosleep,
                                                        SYS_sched_getaffinity};

}  // namespace

CallFilter::CallFilter() {
  load(kArchitecture);
  skip_unless(AUDIT_ARCH_X86_64, 1);
  load(kNumber);  // of another architecture's table it would mean something else: none matches
  allow(kEverybody);
}

void CallFilter::add(int code, uint32_t value, uint8_t yes, uint8_t no) {
  code_.at(length_) = {static_cast<uint16_t>(code), yes, no, value};
  ++length_;
}
void CallFilter::end(uint32_t action) { add(BPF_RET | BPF_K, action, 0, 0); }
void CallFilter::skip_unless(uint32_t value, uint8_t length) {
  add(BPF_JMP | BPF_JEQ | BPF_K, value, 0, length);
}
void CallFilter::load(uint32_t offset) { add(BPF_LD | BPF_W | BPF_ABS, offset, 0, 0); }

bool CallFilter::in_effect() noexcept { return !kSanitized; }

CallFilter& CallFilter::allow(std::initializer_list<unsigned> calls) {
  for (const unsigned number : calls) {
    skip_unless(number, 1);
    end(SECCOMP_RET_ALLOW);
  }
  return *this;
}

CallFilter& CallFilter::allow_requests(uint8_t type) {
  skip_unless(SYS_ioctl, 5);
  load(kSecondArgument);
  add(BPF_ALU | BPF_AND | BPF_K, 0xff00, 0, 0);
  skip_unless(uint32_t{type} << 8, 1);
  end(SECCOMP_RET_ALLOW);
  load(kNumber);
  return *this;
}

CallFilter& CallFilter::allow_threads() {
  skip_unless(SYS_clone, 4);
  load(kFirstArgument);
  add(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 1);
  end(SECCOMP_RET_ALLOW);
  load(kNumber);
  // Its flags are in memory, which a filter cannot see: the C library falls back to clone.
  skip_unless(SYS_clone3, 1);
  end(SECCOMP_RET_ERRNO | ENOSYS);
  // What the C library and we do at a thread's start. The name is all that prctl may set.
  skip_unless(SYS_prctl, 4);
  load(kFirstArgument);
  skip_unless(PR_SET_NAME, 1);
  end(SECCOMP_RET_ALLOW);
  load(kNumber);
  return allow({SYS_set_robust_list, SYS_rseq});
}

void CallFilter::apply(const std::string& thread) noexcept {
  if (kSanitized) return;
  try {
    end(SECCOMP_RET_ERRNO | EPERM);
    const sock_fprog program{static_cast<uint16_t>(length_), code_.data()};
    // A thread that inherited a filter has it set, and may not ask.
    (void)::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    // SPEC_ALLOW: older kernels would slow the thread down, as if it ran code that we do not trust.
    if (::syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) !=
        0) {
      log_warning("{}: runs without a filter of system calls: {}", thread, errno_text(errno));
    }
  } catch (const std::exception& error) {
    log_warning("{}: runs without a filter of system calls: {}", thread, error.what());
  }
}

}  // namespace minivmm::base
