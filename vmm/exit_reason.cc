// SPDX-License-Identifier: Apache-2.0
#include "vmm/exit_reason.h"

namespace minivmm::vmm {

int ExitReason::exit_status() const noexcept {
  switch (kind) {
    case ExitKind::kGuestExit:
      return status;
    case ExitKind::kReset:
    case ExitKind::kPowerOff:
    case ExitKind::kStopped:
      return 0;
    case ExitKind::kCrash:
      return kCrashStatus;
    case ExitKind::kInternalError:
      return kInternalErrorStatus;
  }
  return kInternalErrorStatus;
}

std::string_view to_string(ExitKind kind) noexcept {
  switch (kind) {
    case ExitKind::kGuestExit:
      return "guest exit";
    case ExitKind::kReset:
      return "reset";
    case ExitKind::kPowerOff:
      return "power off";
    case ExitKind::kCrash:
      return "crash";
    case ExitKind::kInternalError:
      return "internal error";
    case ExitKind::kStopped:
      return "stopped";
  }
  return "unknown";
}

}  // namespace minivmm::vmm
