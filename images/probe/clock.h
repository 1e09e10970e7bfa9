// SPDX-License-Identifier: Apache-2.0
// Time since start, from the TSC. Its frequency comes from the first of: `tsc_khz=` on the command
// line, the kvmclock page, the hypervisor's timing leaf, the interval timer (PIT), a guess.
#pragma once

#include <cstdint>

#include "string_view.h"

namespace minivmm::probe {

// `forced_khz` from the command line, or 0.
void start_clock(uint64_t forced_khz);
uint64_t clock_khz();
StringView clock_source();
uint64_t now_ns();

}  // namespace minivmm::probe
