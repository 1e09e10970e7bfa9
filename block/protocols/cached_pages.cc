// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/cached_pages.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <new>
#include <vector>

#include <fmt/core.h>
#include <time.h>

#include "base/checked.h"
#include "base/unique_fd.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kWindowPages = 512;
constexpr uint64_t kWindow = kPage * kWindowPages;
// Of the machine's memory this part, within these bounds.
constexpr uint64_t kPartOfMemory = 16;
constexpr uint64_t kLeastMapped = 16ULL << 20;
constexpr uint64_t kMostMapped = 8ULL << 30;
// The mapping reaches past the file's end, for its growth: addresses cost nothing.
constexpr uint64_t kLeastLength = 1ULL << 30;
constexpr uint64_t kMostLength = 1ULL << 44;
// Milliseconds: how old what is known may be, and how soon one looks again for what was not there.
constexpr uint32_t kFresh = 2000;
constexpr uint32_t kLookAgain = 1000;

// Cheap, and some milliseconds coarse.
uint32_t milliseconds() noexcept {
  timespec now{};
  (void)::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return static_cast<uint32_t>(now.tv_sec * 1000 + now.tv_nsec / 1000000);
}

// A file by its descriptor, for calls that take paths.
struct Path {
  explicit Path(int fd) noexcept {
    *fmt::format_to_n(text, sizeof text - 1, "/proc/self/fd/{}", fd).out = '\0';
  }
  char text[32];
};

// mincore() tells only who owns the file or may write it, and says yes to others.
bool kernel_tells(int fd) noexcept {
  struct stat info {};
  return (::fstat(fd, &info) == 0 && (info.st_uid == ::geteuid() || ::geteuid() == 0)) ||
         ::faccessat(AT_FDCWD, Path(fd).text, W_OK, AT_EACCESS) == 0;
}

// Reading such a file looks for what others have written to it; using its mapped pages does not.
bool may_change_elsewhere(int fd) noexcept {
  constexpr std::array<uint32_t, 11> kShared = {
      NFS_SUPER_MAGIC,  SMB_SUPER_MAGIC,   CIFS_SUPER_MAGIC, SMB2_SUPER_MAGIC,
      FUSE_SUPER_MAGIC, V9FS_MAGIC,        CEPH_SUPER_MAGIC, AFS_SUPER_MAGIC,
      AFS_FS_MAGIC,     OCFS2_SUPER_MAGIC, 0x01161970 /* GFS2 */};
  struct statfs system {};
  if (::fstatfs(fd, &system) != 0) return true;
  const auto type = static_cast<uint32_t>(system.f_type);
  return std::find(kShared.begin(), kShared.end(), type) != kShared.end();
}

bool is_of_a_kind(int fd) noexcept {
  struct stat info {};
  return ::fstat(fd, &info) == 0 && (S_ISREG(info.st_mode) || S_ISBLK(info.st_mode));
}

uint64_t window_bound() noexcept {
  const auto pages = static_cast<uint64_t>(std::max(::sysconf(_SC_PHYS_PAGES), 1L));
  const auto size = static_cast<uint64_t>(std::max(::sysconf(_SC_PAGESIZE), 1L));
  return std::clamp(pages * size / kPartOfMemory, kLeastMapped, kMostMapped) / kWindow;
}

}  // namespace

// What is written by several threads at once is each time a whole truth of a moment ago.
struct CachedPages::Window {
  std::atomic<uint64_t> owner{0};  // the file's id; 0: none
  std::atomic<uint64_t> index{0};  // which of the file's windows
  std::atomic<uint32_t> looked_at{0};
  std::array<std::atomic<uint64_t>, kWindowPages / 64> pages{};  // which are in memory

  bool is(uint64_t id, uint64_t i) const noexcept {
    return owner.load(std::memory_order_relaxed) == id &&
           index.load(std::memory_order_relaxed) == i;
  }
  // Pages from ... to, of the window.
  bool has(uint64_t first, uint64_t last) const noexcept {
    for (uint64_t page = first; page <= last; ++page) {
      const uint64_t word = pages[page / 64].load(std::memory_order_relaxed);
      if ((word >> (page % 64) & 1) == 0) return false;
    }
    return true;
  }
};

class CachedPages::Table {
 public:
  // Null: there is no memory for it. Outlives every file.
  static Table* instance() noexcept {
    static Table* const table = []() -> Table* {
      try {
        return new Table;
      } catch (const std::bad_alloc&) {
        return nullptr;
      }
    }();
    return table;
  }

  uint64_t size() const noexcept { return windows_.size(); }
  Window& at(const CachedPages& file, uint64_t index) noexcept {
    return windows_[(file.first_ + index) % windows_.size()];
  }

  void add(CachedPages& file, uint64_t windows) noexcept {
    const std::lock_guard lock(mutex_);
    // Behind the last one's: files that fit together do not meet.
    file.first_ = next_;
    next_ = (next_ + windows) % windows_.size();
  }

  void remove(const CachedPages& file) noexcept {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < windows_.size(); ++i) {
      if (files_[i] != &file) continue;
      files_[i] = nullptr;
      windows_[i].owner.store(0, std::memory_order_relaxed);
    }
  }

  // Makes the window the file's. False: not now.
  bool take(CachedPages& file, Window& window, uint64_t index) noexcept {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    const auto place = static_cast<size_t>(&window - windows_.data());
    if (const CachedPages* const other = files_[place]) {
      const uint32_t now = milliseconds();
      if (now == last_taken_) return false;
      last_taken_ = now;
      const uint64_t old = window.index.load(std::memory_order_relaxed);
      (void)::madvise(other->base_ + old * kWindow, kWindow, MADV_DONTNEED);
    }
    // Nobody takes one file's pages for another's: the owner comes last.
    window.owner.store(0, std::memory_order_relaxed);
    for (auto& word : window.pages) word.store(0, std::memory_order_relaxed);
    window.looked_at.store(0, std::memory_order_relaxed);
    window.index.store(index, std::memory_order_relaxed);
    window.owner.store(file.id_, std::memory_order_release);
    files_[place] = &file;
    return true;
  }

 private:
  Table() : windows_(window_bound()), files_(windows_.size()) {}

  std::mutex mutex_;
  std::vector<Window> windows_;
  std::vector<const CachedPages*> files_;  // whose mapping holds the window
  uint64_t next_ = 0;
  uint32_t last_taken_ = 0;
};

uint64_t CachedPages::bound() noexcept {
  const Table* const table = Table::instance();
  return table != nullptr ? table->size() * kWindow : 0;
}

std::unique_ptr<CachedPages> CachedPages::map(int fd, uint64_t size) noexcept {
  if (::sysconf(_SC_PAGESIZE) != kPage || size > kMostLength || !is_of_a_kind(fd) ||
      may_change_elsewhere(fd) || !kernel_tells(fd)) {
    return nullptr;
  }
  Table* const table = Table::instance();
  if (table == nullptr) return nullptr;
  const uint64_t length = base::align_up(std::clamp(2 * size, kLeastLength, kMostLength), kWindow);
  // By a description of its own: what is mapped stays for as long as one thread of a killed process
  // does not end, and the file's locks must not.
  const base::UniqueFd again(::open(Path(fd).text, O_RDONLY | O_CLOEXEC));
  if (!again) return nullptr;
  void* const base = ::mmap(nullptr, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, again.get(), 0);
  if (base == MAP_FAILED) return nullptr;
  auto* const file = new (std::nothrow) CachedPages(static_cast<std::byte*>(base), length);
  if (file == nullptr) {
    (void)::munmap(base, length);
    return nullptr;
  }
  table->add(*file, base::div_ceil(size, kWindow));
  return std::unique_ptr<CachedPages>(file);
}

CachedPages::CachedPages(std::byte* base, uint64_t length) noexcept
    : base_(base), length_(length), id_([] {
        static std::atomic<uint64_t> last{0};
        return last.fetch_add(1) + 1;
      }()) {}

CachedPages::~CachedPages() {
  Table::instance()->remove(*this);
  (void)::munmap(base_, length_);
}

const std::byte* CachedPages::find(uint64_t offset, uint64_t length) noexcept {
  if (!base::range_fits(offset, length, length_)) return nullptr;
  const uint64_t last = (offset + length - 1) / kPage;
  for (uint64_t page = offset / kPage; page <= last;) {
    const uint64_t end = std::min(last, page | (kWindowPages - 1));
    if (!resident(page, end)) return nullptr;
    page = end + 1;
  }
  return base_ + offset;
}

// Of one window.
bool CachedPages::resident(uint64_t first_page, uint64_t last_page) noexcept {
  const uint64_t index = first_page / kWindowPages;
  const uint64_t first = first_page % kWindowPages;
  const uint64_t last = last_page % kWindowPages;
  Window& window = Table::instance()->at(*this, index);
  if (!window.is(id_, index)) [[unlikely]] {
    if (!Table::instance()->take(*this, window, index) || !look(window, index)) return false;
    return window.has(first, last);
  }
  const uint32_t age = milliseconds() - window.looked_at.load(std::memory_order_relaxed);
  const bool has = window.has(first, last);
  if (age < (has ? kFresh : kLookAgain)) [[likely]]
    return has;
  return look(window, index) && window.has(first, last);
}

bool CachedPages::look(Window& window, uint64_t index) noexcept {
  std::array<unsigned char, kWindowPages> found;
  if (::mincore(base_ + index * kWindow, kWindow, found.data()) != 0) return false;
  for (size_t i = 0; i < window.pages.size(); ++i) {
    uint64_t word = 0;
    for (size_t bit = 0; bit < 64; ++bit) word |= uint64_t{found[i * 64 + bit] & 1U} << bit;
    window.pages[i].store(word, std::memory_order_relaxed);
  }
  window.looked_at.store(milliseconds(), std::memory_order_relaxed);
  return true;
}

}  // namespace minivmm::block
