// SPDX-License-Identifier: Apache-2.0
// The probe guest under our machine, for tests: collects what it prints, types commands.
#pragma once

#include <string>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "vmm/machine.h"

namespace minivmm::test {

bool kvm_exists();

class MachineGuest {
 public:
  explicit MachineGuest(const std::string& command_line, unsigned vcpus = 1);

  vmm::Machine& machine() { return *machine_; }
  void start() { machine_->start(); }
  // Waits for `text` in the output behind what earlier calls found. False after `timeout`.
  bool expect(const std::string& text, std::chrono::seconds timeout = std::chrono::seconds(20));
  // Types a line into the probe's shell and waits for the result line of its job; "" on timeout.
  std::string command(const std::string& line);
  // Waits for the end; stops the guest after `timeout` (the reason is then kStopped).
  vmm::ExitReason finish(std::chrono::seconds timeout = std::chrono::seconds(60));
  std::string output();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string output_;
  size_t seen_ = 0;
  std::unique_ptr<vmm::Machine> machine_;
};

}  // namespace minivmm::test
