// SPDX-License-Identifier: Apache-2.0
// One open host file. Shared within the process by all nodes on the same inode, because two open
// descriptions of one file would be refused by each other's locks.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <memory>

#include "base/unique_fd.h"

namespace minivmm::block {

enum class Locking { kAuto, kOn, kOff };

struct HostFileOptions {
  std::string filename;  // a path; "/dev/fdset"-like passing is by `fd`
  int fd = -1;           // an inherited descriptor, duplicated; -1: open `filename`
  bool writable = false;
  bool direct = false;  // O_DIRECT
  Locking locking = Locking::kAuto;
};

class HostFile {
 public:
  // Opens, or finds the one that is open. Blocking; call in Pool::syscalls(). Throws with the
  // file's name: ENOENT, EACCES, EISDIR, EBUSY (locked, or open here in a way that conflicts).
  static std::shared_ptr<HostFile> open(const HostFileOptions& options);
  ~HostFile();
  HostFile(const HostFile&) = delete;
  HostFile& operator=(const HostFile&) = delete;

  int fd() const noexcept { return fd_.get(); }
  const std::string& filename() const noexcept { return filename_; }
  bool writable() const noexcept { return writable_; }
  bool direct() const noexcept { return direct_; }
  bool is_device() const noexcept { return is_device_; }
  // Of memory and of offsets for O_DIRECT; 1 when buffered.
  uint32_t memory_alignment() const noexcept { return memory_alignment_; }
  uint32_t offset_alignment() const noexcept { return offset_alignment_; }

  // Bytes now, by the kernel. Throws.
  uint64_t query_size() const;

  // A failed fsync is reported by Linux once and the dirty pages are forgotten: from then on every
  // flush fails with this errno. 0: none failed.
  std::atomic<int> failed_sync{0};

 private:
  struct Key {
    uint64_t device;
    uint64_t inode;
    bool operator==(const Key&) const = default;
  };
  class Registry;
  static Registry& registry();
  HostFile() = default;
  void find_alignment();
  void check_share(const HostFileOptions& options) const;

  base::UniqueFd fd_;
  std::string filename_;
  Key key_{};
  bool writable_ = false;
  bool direct_ = false;
  bool is_device_ = false;
  uint32_t memory_alignment_ = 1;
  uint32_t offset_alignment_ = 1;
};

}  // namespace minivmm::block
