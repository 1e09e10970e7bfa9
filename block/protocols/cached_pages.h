// SPDX-License-Identifier: Apache-2.0
// A host file's pages in the page cache, mapped: where the bytes of a range lie, if they are in
// memory.
//
// What is mapped counts as resident memory of this process, though it is the kernel's and is given
// up when memory is short. So it is bounded, for all files of the process together, to a part of
// the machine's memory: the files share a table of windows of 2 MiB, and one that is not in the
// table is not lent from. A window gives way to another at most once in a few milliseconds: a disk
// that is used all over, and is larger than the table, is read as if this were not here.
//
// What is known of a window's pages is at most two seconds old. A page that has left the memory
// meanwhile is fetched while its reader waits: rare, and not wrong.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace minivmm::block {

class CachedPages {
 public:
  // Null where the kernel maps no such file, or does not tell which of its pages are in memory (to
  // this user: a file of somebody else's that may only be read), and where the pages are not what
  // reading gives. `size`: bytes now; it may grow.
  static std::unique_ptr<CachedPages> map(int fd, uint64_t size, bool writable) noexcept;
  CachedPages(const CachedPages&) = delete;
  CachedPages& operator=(const CachedPages&) = delete;
  // Nobody uses what find() gave any more.
  ~CachedPages();

  // Null: not all of it is known to be in memory. For system calls' arguments only (loan.h). Any
  // thread; does not wait.
  const std::byte* find(uint64_t offset, uint64_t length) noexcept;

  // Whether on a file system of this kind (statfs's type) the mapped pages of a file, which was
  // opened for writing or not, are what reading it gives. Not where other hosts write, too, and the
  // cache is only looked after by reads; so of those that are not known no either.
  static bool are_what_reading_gives(uint32_t file_system, bool writable) noexcept;
  // What all files of the process together have mapped at most, in bytes.
  static uint64_t bound() noexcept;
  // Unmaps all that is mapped, until it is asked for again (forget_lent).
  static void forget_all() noexcept;

 private:
  class Table;
  struct Window;
  CachedPages(std::byte* base, uint64_t length) noexcept;
  bool kernel_tells() noexcept;
  void drop(uint64_t index) const noexcept;
  bool resident(uint64_t first_page, uint64_t last_page) noexcept;
  bool look(Window& window, uint64_t index, uint64_t first, uint64_t last) noexcept;

  std::byte* const base_;
  const uint64_t length_;  // of the mapping; may reach past the end of the file
  const uint64_t id_;      // never that of another file
  uint64_t first_ = 0;     // where its windows begin in the table
};

}  // namespace minivmm::block
