// SPDX-License-Identifier: Apache-2.0
// Why a machine ended. Plain data.
#pragma once

#include <string>
#include <string_view>

namespace minivmm::vmm {

enum class ExitKind {
  kGuestExit,      // the guest wrote a status to the exit port
  kReset,          // the guest asked for a reset (keyboard controller, reset register)
  kPowerOff,       // the guest asked to be switched off
  kCrash,          // triple fault
  kInternalError,  // KVM could not go on; `text` has the registers
  kStopped,        // stop() was called
};

struct ExitReason {
  ExitKind kind = ExitKind::kStopped;
  int status = 0;    // kGuestExit: what the guest wrote, 0 to 255; otherwise 0
  std::string text;  // one or more lines for a user

  // What the process should exit with: the guest's status; 0 for a reset, power-off or stop;
  // kCrashStatus and kInternalErrorStatus for the others.
  int exit_status() const noexcept;
};

inline constexpr int kCrashStatus = 124;
inline constexpr int kInternalErrorStatus = 125;

std::string_view to_string(ExitKind kind) noexcept;

}  // namespace minivmm::vmm
