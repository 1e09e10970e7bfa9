// SPDX-License-Identifier: Apache-2.0
// Locks on image files that QEMU and qemu-img understand: open-file-description byte locks, in
// QEMU's layout. A holder keeps a shared lock on byte 100+p for each permission p it uses and on
// byte 200+p for each one it does not let others use; it then looks whether anybody's locks say
// the opposite.
#pragma once

#include <string>

namespace minivmm::block {

// What a user of an image file does and allows, as QEMU numbers it.
struct FileLock {
  bool writes = false;
};

// Takes the locks on `fd`; retries for about two seconds, because the kernel may keep a killed
// process's locks for some milliseconds. Throws EBUSY naming the file where somebody else's use
// conflicts. Returns false where the file system has no such locks. Blocking.
bool lock_image_file(int fd, const std::string& filename, FileLock lock);

// Lets go of them. Closing the last descriptor of the open file does so too; a descriptor that was
// inherited may have other holders.
void unlock_image_file(int fd) noexcept;

}  // namespace minivmm::block
