// SPDX-License-Identifier: Apache-2.0
#include "tests/system/machine_guest.h"

#include <unistd.h>

#include "images/probe/probe_blob.h"

namespace minivmm::test {

bool kvm_exists() { return ::access("/dev/kvm", F_OK) == 0; }

MachineGuest::MachineGuest(const std::string& command_line, unsigned vcpus) {
  vmm::MachineConfig config;
  config.memory_bytes = uint64_t{128} << 20;
  config.vcpus = vcpus;
  config.kernel.bytes = probe::probe_elf();
  config.kernel.name = "probe guest";
  config.command_line = command_line;
  config.serial.on_output = [this](std::span<const std::byte> bytes) {
    std::lock_guard lock(mutex_);
    for (const auto byte : bytes) output_.push_back(static_cast<char>(byte));
    changed_.notify_all();
  };
  machine_ = std::make_unique<vmm::Machine>(std::move(config));
}

bool MachineGuest::expect(const std::string& text, std::chrono::seconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [&] {
    const size_t at = output_.find(text, seen_);
    if (at == std::string::npos) return false;
    seen_ = at + text.size();
    return true;
  });
}

std::string MachineGuest::command(const std::string& line) {
  const std::string name = line.substr(0, line.find(' '));
  machine_->type(line + "\n");
  if (!expect("probe: " + name + " ")) return {};
  const size_t begin = seen_ - name.size() - 8;
  if (!expect("\n")) return {};
  std::lock_guard lock(mutex_);
  return output_.substr(begin, seen_ - 1 - begin);
}

vmm::ExitReason MachineGuest::finish(std::chrono::seconds timeout) {
  machine_->wait_for(timeout);
  machine_->stop();
  return machine_->wait();
}

std::string MachineGuest::output() {
  std::lock_guard lock(mutex_);
  return output_;
}

}  // namespace minivmm::test
