// SPDX-License-Identifier: Apache-2.0
// The child that looks for a kernel: this program again, with three descriptors and nothing else.
#pragma once

#include <string>
#include <sys/types.h>

#include "base/unique_fd.h"

namespace minivmm::control {

class FinderProcess {
 public:
  // Throws base::Error where it cannot be started.
  FinderProcess();
  // Ends it.
  ~FinderProcess();
  FinderProcess(const FinderProcess&) = delete;
  FinderProcess& operator=(const FinderProcess&) = delete;

  int channel() const noexcept { return channel_.get(); }
  base::UniqueFd& kernel() noexcept { return kernel_; }
  base::UniqueFd& initrd() noexcept { return initrd_; }
  // After the channel broke: how it ended, for a message.
  std::string end();

 private:
  pid_t pid_ = -1;
  base::UniqueFd channel_;
  base::UniqueFd kernel_;
  base::UniqueFd initrd_;
};

}  // namespace minivmm::control
