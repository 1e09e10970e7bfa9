// SPDX-License-Identifier: Apache-2.0
// The signals of a daemon as a descriptor. Blocks SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 in
// this thread and all that it starts later, so it is made before any other thread.
#pragma once

#include <csignal>

#include "base/unique_fd.h"

namespace minivmm::control {

class SignalFd {
 public:
  SignalFd();
  SignalFd(const SignalFd&) = delete;
  SignalFd& operator=(const SignalFd&) = delete;
  ~SignalFd();

  int fd() const noexcept { return fd_.get(); }
  // The next signal that has arrived, or 0.
  int take() noexcept;

 private:
  base::UniqueFd fd_;
  sigset_t before_{};
};

}  // namespace minivmm::control
