// SPDX-License-Identifier: Apache-2.0
// Guest RAM: one mapping a range, with the device hole below 4 GiB left out. Owned by the machine;
// every device that holds view() must be gone before it. Unless asked for, nothing is touched at
// construction: pages appear as the guest or a device uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/unique_fd.h"
#include "virtio/guest_memory.h"

namespace minivmm::vmm {

struct MemoryConfig {
  uint64_t size = uint64_t{256} << 20;  // bytes, a multiple of 4 KiB
  bool shared = false;                  // in a memfd that other processes can map
  bool huge_pages = true;               // ask for transparent huge pages
  // From the host's reserved huge pages of this size (2 MiB or 1 GiB), in a memfd; 0: ordinary
  // pages. All of them are taken at once: a guest that meets an empty reserve would be killed.
  uint64_t huge_page_bytes = 0;
  bool prealloc = false;  // take all pages now
};

class Memory {
 public:
  // Throws base::Error: EINVAL for an unusable size, else what mmap or memfd_create said.
  explicit Memory(const MemoryConfig& config);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const virtio::GuestMemory& view() const noexcept { return view_; }
  uint64_t size() const noexcept { return size_; }
  // The memfd that holds the RAM (file offset = position in RAM without the hole), or -1.
  int memfd() const noexcept { return memfd_.get(); }

  // The bytes of a guest range. Throws base::Error(EFAULT), naming `what`, where it is not RAM.
  std::span<std::byte> bytes(uint64_t address, uint64_t length, const char* what) const;

 private:
  void create_file(uint64_t huge_page_bytes);
  void map(uint64_t guest_base, uint64_t length, uint64_t file_offset, const MemoryConfig& config);
  void unmap() noexcept;

  uint64_t size_;
  base::UniqueFd memfd_;
  std::vector<virtio::MemoryRegion> mapped_;
  virtio::GuestMemory view_;
};

}  // namespace minivmm::vmm
