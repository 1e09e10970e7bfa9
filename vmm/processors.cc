// SPDX-License-Identifier: Apache-2.0
#include "vmm/processors.h"

#include <errno.h>
#include <sched.h>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::vmm {

void check_processors(const std::vector<unsigned>& processors) {
  cpu_set_t usable;
  CPU_ZERO(&usable);
  if (::sched_getaffinity(0, sizeof usable, &usable) != 0) {
    throw base::errno_error(errno, "sched_getaffinity");
  }
  for (const unsigned processor : processors) {
    if (processor >= CPU_SETSIZE || !CPU_ISSET(processor, &usable)) {
      throw base::Error(EINVAL, fmt::format("processor {} is not there, or not for this process "
                                            "({} are)",
                                            processor, CPU_COUNT(&usable)));
    }
  }
}

void run_on_processors(const std::vector<unsigned>& processors,
                       const std::string& thread) noexcept {
  if (processors.empty()) return;
  cpu_set_t wanted;
  CPU_ZERO(&wanted);
  for (const unsigned processor : processors) {
    if (processor < CPU_SETSIZE) CPU_SET(processor, &wanted);
  }
  if (::sched_setaffinity(0, sizeof wanted, &wanted) != 0) {
    base::log_warning("{}: cannot be bound to its processors: {}", thread, base::errno_text(errno));
  }
}

}  // namespace minivmm::vmm
