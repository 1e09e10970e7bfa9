// SPDX-License-Identifier: Apache-2.0
#include "vmm/thread_filter.h"

#include <linux/kvm.h>
#include <sys/syscall.h>

#include "base/call_filter.h"
#include "base/log.h"

namespace minivmm::vmm {

void confine_thread(ThreadKind kind, const std::string& thread) noexcept {
  try {
    base::CallFilter filter;
    if (kind == ThreadKind::kVcpu) {
      filter.allow_requests(KVMIO);
    } else {
      filter.allow({SYS_recvfrom, SYS_sendto, SYS_accept4, SYS_close});
    }
    filter.apply(thread);
  } catch (const std::exception& error) {
    base::log_warning("{}: runs without a filter of system calls: {}", thread, error.what());
  }
}

}  // namespace minivmm::vmm
