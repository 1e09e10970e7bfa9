// SPDX-License-Identifier: Apache-2.0
// The process that `boot` starts to look for a kernel on a disk (control/disk_kernel.h). It parses
// what a guest may have written, so it gives up all it can before the first byte.
#include <linux/close_range.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "base/error.h"
#include "bootdisk/channel.h"
#include "bootdisk/child.h"
#include "cli/command.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {
namespace {

constexpr SandboxLimits kLimits{.memory = 256 << 20};
constexpr rlim_t kCpuSeconds = 30;

void enter_sandbox(uint64_t largest_file) {
  (void)::syscall(SYS_close_range, bootdisk::kInitrdFd + 1, ~0U, 0);
  limit_resources(kLimits);
  const rlimit cpu{kCpuSeconds, kCpuSeconds};
  const rlimit file{largest_file, largest_file};
  if (::setrlimit(RLIMIT_CPU, &cpu) != 0 || ::setrlimit(RLIMIT_FSIZE, &file) != 0) {
    throw base::errno_error(errno, "setrlimit");
  }
  // An older kernel lacks some of it: the rest holds.
  for (void (*const limit)() : {+[] { limit_files({}); }, &limit_system_calls}) {
    try {
      limit();
    } catch (const base::Error&) {
    }
  }
}

}  // namespace

int run_find_kernel() { return bootdisk::run_child(&enter_sandbox); }

}  // namespace minivmm::cli
