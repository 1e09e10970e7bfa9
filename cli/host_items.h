// SPDX-License-Identifier: Apache-2.0
// What `check-host` looks at: one item a thing that this machine has, has in part, or lacks.
// Blocking; looks only, changes nothing.
#pragma once

#include <string>

#include <vector>

namespace minivmm::cli {

enum class HostState { kOk, kLimited, kMissing };

struct HostItem {
  std::string name;
  HostState state = HostState::kOk;
  // Without it the main job (a guest, with its disks served over NBD and FUSE) cannot run.
  bool needed = false;
  std::string text;    // what there is
  std::string advice;  // what to do about what it lacks; empty if nothing
};

HostItem check_kernel();
HostItem check_processors();
HostItem check_memory();
HostItem check_kvm();
HostItem check_io_uring();
HostItem check_fuse();
HostItem check_allow_other();
HostItem check_huge_pages();
HostItem check_nbd_module();

// All of them, in order.
std::vector<HostItem> check_host();

}  // namespace minivmm::cli
