// SPDX-License-Identifier: Apache-2.0
// The probe guest under QEMU's microvm with an emulated CPU: shows that the probe is right about
// virtio independently of our device.
#pragma once

#include <string>

#include <vector>

namespace minivmm::test {

bool qemu_exists();

struct QemuResult {
  int exit_code = -1;  // of QEMU; -1 if it had to be killed
  int status = -1;     // the guest's, from isa-debug-exit; -1 if it gave none
  std::string output;
};

// Runs to the end, or kills QEMU after `seconds`. `input` is typed once the shell is there.
QemuResult run_qemu(const std::string& command_line, const std::vector<std::string>& arguments,
                    int seconds, const std::string& input = {});

// Arguments for a raw disk.
std::vector<std::string> qemu_disk(const std::string& path, const std::string& device_options = {});

}  // namespace minivmm::test
