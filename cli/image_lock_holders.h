// SPDX-License-Identifier: Apache-2.0
// Who holds the locks on an image file, as far as /proc tells.
#pragma once

#include <string>

#include <vector>

namespace minivmm::cli {

struct LockHolder {
  int pid = 0;
  std::string command;
};

struct LockHolders {
  std::vector<LockHolder> found;
  // Some processes could not be looked at.
  bool hidden = false;
};

// Processes (other than this one) with locks of image tools on the file. Blocking, but brief.
LockHolders find_lock_holders(const std::string& path);

// Looks for them now, if there are any locks, so that lock_holders_text() can tell of them where
// /proc cannot be read any more. Main thread, before any other.
void remember_lock_holders(const std::string& path);

// "it is locked by process 123 (qemu-system-x86_64)", or that none was found, or could be seen.
std::string lock_holders_text(const std::string& path);

}  // namespace minivmm::cli
