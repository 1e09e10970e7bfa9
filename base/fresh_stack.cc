// SPDX-License-Identifier: Apache-2.0
#include "base/fresh_stack.h"

namespace minivmm::base::internal {

// Both fibers are of one loop, so plain members do.
void FreshStack::wait() noexcept {
  if (done) return;
  waiting = true;
  caller->waiting_for = "its continuation";
  caller->suspend();
}

void FreshStack::finish() noexcept {
  done = true;
  if (waiting) caller->loop().wake(*caller);
}

}  // namespace minivmm::base::internal
