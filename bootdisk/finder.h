// SPDX-License-Identifier: Apache-2.0
// Finds the system that a disk would boot: its kernel, initial ramdisks and command line. It looks
// at what boot loaders read, in this order for each ext file system of the disk: entries of the
// Boot Loader Specification, grub.cfg, extlinux.conf; and without any of them takes the newest
// kernel of /boot.
#pragma once

#include <string>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "bootdisk/boot_entry.h"
#include "bootdisk/ext_volume.h"

namespace minivmm::bootdisk {

using Sink = std::function<void(std::span<const std::byte>)>;

class Finder {
 public:
  // `disk` must outlive the finder. Throws what reading throws; a file system that cannot be
  // opened is left out and named in notes().
  explicit Finder(ByteSource& disk);
  ~Finder();

  struct Found {
    BootEntry entry;     // the files exist
    std::string origin;  // for messages: "partition 1: /boot/grub/grub.cfg"
  };
  // Nullopt: there is no kernel in any of the file systems.
  std::optional<Found> find();

  // The file that an entry of find() names. Throws as ExtVolume::copy.
  void copy(const std::string& path, uint64_t limit, const Sink& sink) const;

  // What a user should know: file systems that were left out, journals not replayed.
  const std::vector<std::string>& notes() const noexcept { return notes_; }
  // "partition 2: XFS", "the disk: btrfs": where a system may be that is not looked into.
  const std::vector<std::string>& foreign() const noexcept { return foreign_; }

 private:
  using Entries = std::vector<BootEntry>;
  std::optional<Found> find_on(const ExtVolume& volume);
  // The first of them whose files are there.
  std::optional<Found> choose(const ExtVolume& volume, const std::string& file, Entries entries);
  Entries loader_entries(const ExtVolume& volume, const std::string& boot) const;
  Entries grub_entries(const ExtVolume& volume, const std::string& file) const;
  std::optional<BootEntry> newest_kernel(const ExtVolume& volume, const std::string& boot) const;
  std::string root_argument() const;
  const ExtVolume* volume_with(const std::string& path) const;

  std::vector<std::unique_ptr<ExtVolume>> volumes_;
  const ExtVolume* chosen_ = nullptr;  // where the entry was found: its files are looked for first
  std::vector<std::string> notes_;
  std::vector<std::string> foreign_;
};

}  // namespace minivmm::bootdisk
