// SPDX-License-Identifier: Apache-2.0
// The child's side of the search: speaks on kChannelFd, writes to kKernelFd and kInitrdFd.
#pragma once

#include <cstdint>

namespace minivmm::bootdisk {

// Returns the process's exit status. `prepare` is called once, before the disk is looked at, with
// the largest size that the kernel or the initrds may have, bytes: it gives up what the search does
// not need (files, system calls). What it throws ends the search.
int run_child(void (*prepare)(uint64_t limit));

}  // namespace minivmm::bootdisk
