// SPDX-License-Identifier: Apache-2.0
// The files of a mount by name and by inode number. Any thread. The root directory is inode 1;
// numbers of files are never used twice, so that a removed file and its successor of the same name
// are different to the kernel.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fuse/file.h"

namespace minivmm::fuse {

inline constexpr uint64_t kRootInode = 1;

// Throws base::Error(EINVAL) unless `name` can be a file's: not empty, "." or "..", no '/', no
// control characters, at most 255 bytes.
void check_file_name(std::string_view name);

class FileTable {
 public:
  // Throws EINVAL (see check_file_name) and EEXIST.
  void add(const std::string& name, block::Handle handle, bool writable);
  // Takes the file out of the directory; it stays known by its inode number while it is open.
  // nullptr if there is none. Throws EBUSY where it is to be unused and is open.
  std::shared_ptr<File> remove(const std::string& name, bool only_unused = false);

  std::shared_ptr<File> find(std::string_view name) const;
  std::shared_ptr<File> find(uint64_t inode) const;

  // The kernel opens and releases. The pointer is good until the release that belongs to it;
  // nullptr if the file is gone.
  File* open(uint64_t inode);
  void release(File& file);

  // A file of the directory whose inode number is above `inode`, the least of them; nullptr at
  // the end.
  std::shared_ptr<File> next_after(uint64_t inode) const;
  std::vector<std::shared_ptr<File>> all() const;
  std::vector<std::string> describe() const;

 private:
  mutable std::mutex mutex_;
  std::map<uint64_t, std::shared_ptr<File>> listed_;  // the directory
  // Removed and still open.
  std::map<uint64_t, std::shared_ptr<File>> unlisted_;
  uint64_t next_inode_ = kRootInode + 1;
};

}  // namespace minivmm::fuse
