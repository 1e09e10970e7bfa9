// SPDX-License-Identifier: Apache-2.0
// What the kernel does for the sandbox: limits, Landlock, seccomp.
#include <fcntl.h>
#include <linux/landlock.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include <fmt/core.h>
#include <seccomp.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

using base::Error;

namespace {

void set_limit(__rlimit_resource resource, uint64_t value) {
  struct rlimit limit {};
  if (::getrlimit(resource, &limit) != 0) throw base::errno_error(errno, "getrlimit");
  // Never more than what the user has set already.
  if (limit.rlim_max != RLIM_INFINITY && limit.rlim_max < value) value = limit.rlim_max;
  limit.rlim_cur = limit.rlim_max = value;
  if (::setrlimit(resource, &limit) != 0) throw base::errno_error(errno, "setrlimit");
}

// A handler: only async-signal-safe calls.
void on_cpu_limit(int) {
  constexpr char kText[] = "the image took more CPU time than allowed (see --limit-cpu)\n";
  (void)!::write(STDERR_FILENO, kText, sizeof kText - 1);
  ::_exit(1);
}

}  // namespace

void limit_resources(const SandboxLimits& limits) {
  ::signal(SIGXCPU, &on_cpu_limit);
  struct rlimit cpu {};
  if (::getrlimit(RLIMIT_CPU, &cpu) != 0) throw base::errno_error(errno, "getrlimit");
  // A second between the signal and the end.
  const bool limited = limits.cpu_seconds != 0;
  if (limited && (cpu.rlim_max == RLIM_INFINITY || cpu.rlim_max > limits.cpu_seconds + 1)) {
    cpu = {limits.cpu_seconds, limits.cpu_seconds + 1};
    if (::setrlimit(RLIMIT_CPU, &cpu) != 0) throw base::errno_error(errno, "setrlimit");
  }
  set_limit(RLIMIT_CORE, 0);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  // Sanitizers map terabytes for themselves.
  if (limits.memory != 0) set_limit(RLIMIT_DATA, limits.memory);
#endif
}

void limit_files(const std::vector<std::string>& readable) {
  const long abi =
      ::syscall(SYS_landlock_create_ruleset, nullptr, 0, LANDLOCK_CREATE_RULESET_VERSION);
  if (abi < 1) {
    throw Error(ENOSYS,
                "this kernel has no Landlock: what the image names is not kept from being "
                "opened by the kernel, only by this program");
  }
  // Everything that the first version knows; later rights only add to what is refused.
  landlock_ruleset_attr rules{};
  rules.handled_access_fs = (LANDLOCK_ACCESS_FS_MAKE_SYM << 1) - 1;
  const base::UniqueFd ruleset(
      static_cast<int>(::syscall(SYS_landlock_create_ruleset, &rules, sizeof rules, 0)));
  if (!ruleset) throw base::errno_error(errno, "landlock_create_ruleset");
  for (const std::string& path : readable) {
    const base::UniqueFd file(::open(path.c_str(), O_PATH | O_CLOEXEC));
    if (!file) continue;  // opening it will tell
    landlock_path_beneath_attr rule{};
    rule.allowed_access = LANDLOCK_ACCESS_FS_READ_FILE;
    rule.parent_fd = file.get();
    if (::syscall(SYS_landlock_add_rule, ruleset.get(), LANDLOCK_RULE_PATH_BENEATH, &rule, 0) !=
        0) {
      throw base::errno_error(errno, fmt::format("{}: landlock_add_rule", path));
    }
  }
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) {
    throw base::errno_error(errno, "no_new_privs");
  }
  if (::syscall(SYS_landlock_restrict_self, ruleset.get(), 0) != 0) {
    throw base::errno_error(errno, "landlock_restrict_self");
  }
}

namespace {

// What event loops on epoll, pools of threads, and reading files need.
constexpr int kAllowed[] = {
    // files
    SCMP_SYS(read),
    SCMP_SYS(pread64),
    SCMP_SYS(readv),
    SCMP_SYS(preadv),
    SCMP_SYS(preadv2),
    SCMP_SYS(write),
    SCMP_SYS(writev),
    SCMP_SYS(close),
    SCMP_SYS(lseek),
    SCMP_SYS(fstat),
    SCMP_SYS(stat),
    SCMP_SYS(lstat),
    SCMP_SYS(newfstatat),
    SCMP_SYS(statx),
    SCMP_SYS(fcntl),
    SCMP_SYS(readlink),
    SCMP_SYS(readlinkat),
    SCMP_SYS(fadvise64),
    SCMP_SYS(getcwd),
    SCMP_SYS(fsync),
    SCMP_SYS(fdatasync),
    SCMP_SYS(getdents64),
    SCMP_SYS(access),
    SCMP_SYS(faccessat),
    SCMP_SYS(faccessat2),
    SCMP_SYS(fstatfs),
    // memory
    SCMP_SYS(mmap),
    SCMP_SYS(munmap),
    SCMP_SYS(mprotect),
    SCMP_SYS(mremap),
    SCMP_SYS(madvise),
    SCMP_SYS(brk),
    // threads and time
    SCMP_SYS(futex),
    SCMP_SYS(set_robust_list),
    SCMP_SYS(rseq),
    SCMP_SYS(sched_yield),
    SCMP_SYS(sched_getaffinity),
    SCMP_SYS(clock_gettime),
    SCMP_SYS(clock_getres),
    SCMP_SYS(clock_nanosleep),
    SCMP_SYS(nanosleep),
    SCMP_SYS(gettid),
    SCMP_SYS(getpid),
    SCMP_SYS(getuid),
    SCMP_SYS(geteuid),
    SCMP_SYS(getrandom),
    SCMP_SYS(membarrier),
    SCMP_SYS(exit),
    SCMP_SYS(exit_group),
    SCMP_SYS(restart_syscall),
    SCMP_SYS(getcpu),
    SCMP_SYS(sysinfo),
    SCMP_SYS(prctl),
    // events
    SCMP_SYS(epoll_create1),
    SCMP_SYS(epoll_ctl),
    SCMP_SYS(epoll_wait),
    SCMP_SYS(epoll_pwait),
    SCMP_SYS(epoll_pwait2),
    SCMP_SYS(eventfd2),
    SCMP_SYS(timerfd_create),
    SCMP_SYS(timerfd_settime),
    SCMP_SYS(poll),
    SCMP_SYS(ppoll),
    // signals
    SCMP_SYS(rt_sigaction),
    SCMP_SYS(rt_sigprocmask),
    SCMP_SYS(rt_sigreturn),
    SCMP_SYS(sigaltstack),
    SCMP_SYS(tgkill),
};

// Threads only, no processes; files for reading only; terminals may be asked what they are.
void add_conditional(scmp_filter_ctx filter) {
  constexpr uint64_t kThread = CLONE_VM | CLONE_THREAD;
  int bad = ::seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(clone), 1,
                               SCMP_A0(SCMP_CMP_MASKED_EQ, kThread, kThread));
  // Its flags are in memory, which seccomp cannot see: the C library falls back to clone.
  bad |= ::seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(clone3), 0);
  constexpr uint64_t kWriting = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
  bad |= ::seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(openat), 1,
                            SCMP_A2(SCMP_CMP_MASKED_EQ, kWriting, O_RDONLY));
  bad |= ::seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(open), 1,
                            SCMP_A1(SCMP_CMP_MASKED_EQ, kWriting, O_RDONLY));
  constexpr uint64_t kGetTerminal = 0x5401;     // TCGETS
  constexpr uint64_t kDeviceSize = 0x80081272;  // BLKGETSIZE64
  constexpr uint64_t kSectorSize = 0x1268;      // BLKSSZGET
  for (const uint64_t request : {kGetTerminal, kDeviceSize, kSectorSize}) {
    bad |= ::seccomp_rule_add(filter, SCMP_ACT_ALLOW, SCMP_SYS(ioctl), 1,
                              SCMP_A1(SCMP_CMP_EQ, request, 0));
  }
  if (bad != 0) throw Error(EINVAL, "seccomp: a rule was refused");
}

}  // namespace

void limit_system_calls() {
  using Filter = std::unique_ptr<void, void (*)(scmp_filter_ctx)>;
  // Everything else fails rather than kills: libraries probe for what there is.
  const Filter filter(::seccomp_init(SCMP_ACT_ERRNO(EPERM)), &::seccomp_release);
  if (!filter) throw Error(ENOMEM, "seccomp");
  for (const int call : kAllowed) {
    const int result = ::seccomp_rule_add(filter.get(), SCMP_ACT_ALLOW, call, 0);
    if (result != 0) throw base::errno_error(-result, fmt::format("seccomp: system call {}", call));
  }
  add_conditional(filter.get());
  (void)::seccomp_attr_set(filter.get(), SCMP_FLTATR_CTL_TSYNC, 1);
  const int result = ::seccomp_load(filter.get());
  if (result == -ECANCELED || result == -EINVAL || result == -EFAULT) {
    throw Error(ENOSYS, "this kernel has no seccomp filters: system calls are not restricted");
  }
  if (result != 0) throw base::errno_error(-result, "seccomp");
}

}  // namespace minivmm::cli
