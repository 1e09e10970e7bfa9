// SPDX-License-Identifier: Apache-2.0
// Reads files of an ext2, ext3 or ext4 file system, by libext2fs. The journal is not replayed. For
// a process of its own without rights: the library was not made for hostile file systems.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bootdisk/byte_source.h"
#include "bootdisk/partitions.h"

namespace minivmm::bootdisk {

class ExtVolume {
 public:
  // Null: it holds another file system, or none. `disk` must outlive the volume. Throws
  // base::Error for an ext file system that cannot be read.
  static std::unique_ptr<ExtVolume> open(ByteSource& disk, const Volume& volume);
  ~ExtVolume();
  ExtVolume(const ExtVolume&) = delete;
  ExtVolume& operator=(const ExtVolume&) = delete;

  const Volume& volume() const noexcept { return volume_; }
  bool needs_recovery() const noexcept;

  // Paths are absolute; symbolic links are followed inside the file system.
  bool exists(const std::string& path) const;
  // The names in a directory, without order, at most kMaxNames; none where there is no directory.
  std::vector<std::string> list(const std::string& directory) const;
  // A small file; nullopt where there is none or it is larger than kMaxText.
  std::optional<std::string> read_text(const std::string& path) const;
  // Gives a regular file's bytes to `sink` in order. Throws base::Error: ENOENT, EFBIG above
  // `limit`, EIO.
  void copy(const std::string& path, uint64_t limit,
            const std::function<void(std::span<const std::byte>)>& sink) const;

  static constexpr size_t kMaxNames = 4096;
  static constexpr uint64_t kMaxText = 1 << 20;

 private:
  struct Library;
  ExtVolume(const Volume& volume, std::unique_ptr<Library> library);

  const Volume volume_;
  const std::unique_ptr<Library> library_;
};

}  // namespace minivmm::bootdisk
