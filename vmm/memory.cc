// SPDX-License-Identifier: Apache-2.0
#include "vmm/memory.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

constexpr uint64_t kHugePage = uint64_t{2} << 20;
constexpr uint64_t kGiantPage = uint64_t{1} << 30;
constexpr uint64_t kMinimum = uint64_t{2} << 20;
// Far above what a host has, far below what address arithmetic could wrap at.
constexpr uint64_t kMaximum = uint64_t{1} << 44;

// Address space for `length` bytes at a boundary of huge pages, or nullptr: KVM can use a huge page
// only where guest and host addresses agree on its boundaries. Kernels before 6.7 place no mapping
// so.
void* reserve(uint64_t length, uint64_t boundary) {
  const uint64_t room = length + boundary;
  void* const all =
      ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<std::byte*>(all);
  const auto address = reinterpret_cast<uintptr_t>(all);
  const uint64_t before = base::align_up<uint64_t>(address, boundary) - address;
  if (before != 0) ::munmap(begin, before);
  ::munmap(begin + before + length, boundary - before);
  return begin + before;
}

uint64_t checked_size(uint64_t size) {
  if (size < kMinimum || size > kMaximum || !base::is_aligned(size, kPageSize)) {
    throw base::Error(
        EINVAL, fmt::format("memory size {} is not possible: it must be a multiple of 4 KiB, at "
                            "least 2 MiB and at most 16 TiB",
                            size));
  }
  return size;
}

}  // namespace

Memory::Memory(const MemoryConfig& config) : size_(checked_size(config.size)) {
  if (config.shared || config.huge_page_bytes != 0) create_file(config.huge_page_bytes);
  try {
    const uint64_t low = std::min(size_, kHoleStart);
    map(0, low, 0, config);
    if (size_ > low) map(kHoleEnd, size_ - low, low, config);
    view_ = virtio::GuestMemory(mapped_);
  } catch (...) {
    unmap();
    throw;
  }
}

Memory::~Memory() { unmap(); }

void Memory::create_file(uint64_t huge_page_bytes) {
  unsigned flags = MFD_CLOEXEC;
  if (huge_page_bytes != 0) {
    if (huge_page_bytes != kHugePage && huge_page_bytes != kGiantPage) {
      throw base::Error(EINVAL, fmt::format("guest RAM: there are no huge pages of {} bytes, only "
                                            "of 2 MiB and 1 GiB",
                                            huge_page_bytes));
    }
    if (!base::is_aligned(size_, huge_page_bytes)) {
      throw base::Error(EINVAL, fmt::format("guest RAM: {} bytes are not a multiple of its huge "
                                            "pages of {}",
                                            size_, huge_page_bytes));
    }
    flags |= MFD_HUGETLB | (huge_page_bytes == kHugePage ? MFD_HUGE_2MB : MFD_HUGE_1GB);
  }
  memfd_.reset(::memfd_create("minivmm-guest-ram", flags));
  if (!memfd_) throw base::errno_error(errno, "guest RAM: cannot create a memfd");
  if (::ftruncate(memfd_.get(), static_cast<off_t>(size_)) != 0) {
    throw base::errno_error(errno,
                            fmt::format("guest RAM: cannot make a memfd of {} bytes", size_));
  }
  if (huge_page_bytes != 0 && ::fallocate(memfd_.get(), 0, 0, static_cast<off_t>(size_)) != 0) {
    throw base::errno_error(
        errno, fmt::format("guest RAM: no {} free huge pages of {} MiB; reserve more: echo N > "
                           "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                           size_ / huge_page_bytes, huge_page_bytes >> 20, huge_page_bytes >> 10));
  }
}

void Memory::map(uint64_t guest_base, uint64_t length, uint64_t file_offset,
                 const MemoryConfig& config) {
  const int flags = memfd_ ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* const place = reserve(length, std::max(kHugePage, config.huge_page_bytes));
  void* host = MAP_FAILED;
  if (place != nullptr) {
    host = ::mmap(place, length, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE | MAP_FIXED,
                  memfd_.get(), static_cast<off_t>(file_offset));
  }
  if (host == MAP_FAILED) {
    const int err = errno;
    if (place != nullptr) ::munmap(place, length);
    errno = err;
    throw base::errno_error(
        errno, fmt::format("guest RAM: cannot map {} bytes; give the guest less memory", length));
  }
  mapped_.push_back({guest_base, length, static_cast<std::byte*>(host)});
  // Advice only: a kernel built without huge pages refuses it and nothing is lost but speed.
  if (config.huge_pages) (void)::madvise(host, length, MADV_HUGEPAGE);
  // A core dump is for our state; the guest's RAM would make it unusably large.
  (void)::madvise(host, length, MADV_DONTDUMP);
  if (config.prealloc && ::madvise(host, length, MADV_POPULATE_WRITE) != 0) {
    throw base::errno_error(
        errno, fmt::format("guest RAM: the host has no {} bytes to give at once (prealloc needs "
                           "Linux 5.14)",
                           length));
  }
}

void Memory::unmap() noexcept {
  for (const auto& region : mapped_) ::munmap(region.host, region.size);
  mapped_.clear();
}

std::span<std::byte> Memory::bytes(uint64_t address, uint64_t length, const char* what) const {
  std::byte* host = view_.at(address, length);
  if (host == nullptr) {
    throw base::Error(EFAULT, fmt::format("{}: {} bytes at {:#x} are not in guest RAM ({} MiB); "
                                          "give the guest more memory",
                                          what, length, address, size_ >> 20));
  }
  return {host, length};
}

}  // namespace minivmm::vmm
