// SPDX-License-Identifier: Apache-2.0
// One open host file. Shared within the process by all nodes on the same inode, because two open
// descriptions of one file would be refused by each other's locks. It knows who has it open, so
// that a refusal can name them.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/unique_fd.h"
#include "block/protocols/cached_pages.h"

struct stat;

namespace minivmm::block {

enum class Locking { kAuto, kOn, kOff };

struct HostFileOptions {
  std::string opener;    // how messages name who opens it: "node 'disk0.file'"
  std::string filename;  // a path; "/dev/fdset"-like passing is by `fd`
  int fd = -1;           // an inherited descriptor, duplicated; -1: open `filename`
  bool writable = false;
  bool direct = false;  // O_DIRECT
  Locking locking = Locking::kAuto;
  std::string inode;  // "DEVICE:INODE" (decimal) that it has to be; empty: any file
};

class HostFile {
 public:
  // Opens, or finds the one that is open; open until the pointer and its copies are gone. Blocking;
  // call in Pool::errands(). Throws with the file's name: ENOENT, EACCES, EISDIR, EBUSY (locked,
  // or open here in a way that conflicts).
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

  // Its pages in the page cache; null where it has none, or none can be known.
  CachedPages* cached_pages() const noexcept { return cached_pages_.get(); }

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
  static std::optional<Key> key_of(const struct stat& info) noexcept;
  class Registry;
  static Registry& registry();
  class Opener;
  HostFile() = default;
  void open_descriptor(const HostFileOptions& options);
  void open_path(const HostFileOptions& options);
  void duplicate(const HostFileOptions& options);
  void set_flags();
  static void check_inode(const HostFileOptions& options, const struct stat& info);
  void lock(Locking locking);
  void find_alignment();
  void check_share(const HostFileOptions& options, bool direct) const;
  bool in_use() const;
  std::string openers() const;
  // A pointer that is `opener`'s: while it lives it is named.
  static std::shared_ptr<HostFile> opened_by(std::shared_ptr<HostFile> file, std::string opener);

  base::UniqueFd fd_;
  std::unique_ptr<CachedPages> cached_pages_;
  std::string filename_;
  Key key_{};
  bool writable_ = false;
  bool direct_ = false;
  bool is_device_ = false;
  bool locked_ = false;
  uint32_t memory_alignment_ = 1;
  uint32_t offset_alignment_ = 1;
  mutable std::mutex openers_mutex_;
  std::vector<std::string> openers_;  // guarded by openers_mutex_
};

}  // namespace minivmm::block
