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
#include "block/graph/lent.h"

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

// A device has a page cache of its own, whatever its node lies on.
bool may_be_mapped(int fd, bool writable) noexcept {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return false;
  if (S_ISBLK(info.st_mode)) return true;
  struct statfs system {};
  return S_ISREG(info.st_mode) && ::fstatfs(fd, &system) == 0 &&
         CachedPages::are_what_reading_gives(static_cast<uint32_t>(system.f_type), writable);
}

uint64_t window_bound() noexcept {
  const auto pages = static_cast<uint64_t>(std::max(::sysconf(_SC_PHYS_PAGES), 1L));
  const auto size = static_cast<uint64_t>(std::max(::sysconf(_SC_PAGESIZE), 1L));
  return std::clamp(pages * size / kPartOfMemory, kLeastMapped, kMostMapped) / kWindow;
}

}  // namespace

// Written under the table's mutex, read without it: who looks while a window changes hands may take
// another file's pages for his own, and waits for what is not there.
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

  static bool exists() noexcept { return exists_.load(std::memory_order_acquire); }

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
    for (Place& each : gone_) {
      if (each.file == &file) each.file = nullptr;
    }
  }

  void clear() noexcept {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < windows_.size(); ++i) {
      if (files_[i] == nullptr) continue;
      windows_[i].owner.store(0, std::memory_order_relaxed);
      files_[i]->drop(windows_[i].index.load(std::memory_order_relaxed));
      files_[i] = nullptr;
    }
    for (Place& each : gone_) {
      if (each.file != nullptr) each.file->drop(each.index);
      each.file = nullptr;
    }
  }

  // Which of the window's pages are in memory. False: it is not the file's any more, or not now.
  bool note(const CachedPages& file, Window& window, uint64_t index,
            const std::array<unsigned char, kWindowPages>& found) noexcept {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || !window.is(file.id_, index)) return false;
    for (size_t i = 0; i < window.pages.size(); ++i) {
      uint64_t word = 0;
      for (size_t bit = 0; bit < 64; ++bit) word |= uint64_t{found[i * 64 + bit] & 1U} << bit;
      window.pages[i].store(word, std::memory_order_relaxed);
    }
    window.looked_at.store(milliseconds(), std::memory_order_relaxed);
    return true;
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
      drop({other, window.index.load(std::memory_order_relaxed)});
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
  struct Place {
    const CachedPages* file = nullptr;
    uint64_t index = 0;
  };
  Table() : windows_(window_bound()), files_(windows_.size()) { exists_.store(true); }

  bool has(const Place& place) noexcept {
    const Window& window = at(*place.file, place.index);
    return files_[static_cast<size_t>(&window - windows_.data())] == place.file &&
           window.index.load(std::memory_order_relaxed) == place.index;
  }
  // What was lent of it before may be used after, and is mapped then though no window is the
  // file's: so it is dropped once more when others have gone.
  void drop(const Place& now) noexcept {
    now.file->drop(now.index);
    Place& before = gone_[gone_count_++ % gone_.size()];
    if (before.file != nullptr && !has(before)) before.file->drop(before.index);
    before = now;
  }

  std::mutex mutex_;
  std::vector<Window> windows_;
  std::vector<const CachedPages*> files_;  // whose mapping holds the window
  static inline std::atomic<bool> exists_{false};

  std::array<Place, 8> gone_;  // the last ones that gave way
  size_t gone_count_ = 0;
  uint64_t next_ = 0;
  uint32_t last_taken_ = 0;
};

bool CachedPages::are_what_reading_gives(uint32_t file_system, bool writable) noexcept {
  // What <linux/magic.h> does not have.
  constexpr uint32_t kBcachefs = 0xca451a4e, kExfat = 0x2011bab0, kJfs = 0x3153464a,
                     kNtfs3 = 0x7366746e, kUdf = 0x15013346;
  constexpr std::array<uint32_t, 17> kOneHosts = {EXT4_SUPER_MAGIC,
                                                  XFS_SUPER_MAGIC,
                                                  BTRFS_SUPER_MAGIC,
                                                  F2FS_SUPER_MAGIC,
                                                  TMPFS_MAGIC,
                                                  RAMFS_MAGIC,
                                                  SQUASHFS_MAGIC,
                                                  EROFS_SUPER_MAGIC_V1,
                                                  ISOFS_SUPER_MAGIC,
                                                  MSDOS_SUPER_MAGIC,
                                                  REISERFS_SUPER_MAGIC,
                                                  NILFS_SUPER_MAGIC,
                                                  kBcachefs,
                                                  kExfat,
                                                  kJfs,
                                                  kNtfs3,
                                                  kUdf};
  // Where somebody opens it for writing it becomes another file, which reads see and mappings do
  // not.
  if (file_system == OVERLAYFS_SUPER_MAGIC) return writable;
  return std::find(kOneHosts.begin(), kOneHosts.end(), file_system) != kOneHosts.end();
}

void forget_lent() noexcept { CachedPages::forget_all(); }

void CachedPages::forget_all() noexcept {
  if (Table::exists()) Table::instance()->clear();
}

uint64_t CachedPages::bound() noexcept {
  const Table* const table = Table::instance();
  return table != nullptr ? table->size() * kWindow : 0;
}

std::unique_ptr<CachedPages> CachedPages::map(int fd, uint64_t size, bool writable) noexcept {
  if (::sysconf(_SC_PAGESIZE) != kPage || size > kMostLength - kWindow ||
      !may_be_mapped(fd, writable)) {
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
  // Of a deleted file, or one without a name, a core dump would get all that the disk holds.
  (void)::madvise(base, length, MADV_DONTDUMP);
  auto* const file = new (std::nothrow) CachedPages(static_cast<std::byte*>(base), length);
  if (file == nullptr) {
    (void)::munmap(base, length);
    return nullptr;
  }
  std::unique_ptr<CachedPages> out(file);
  if (!out->kernel_tells()) return nullptr;
  table->add(*out, base::div_ceil(size, kWindow));
  return out;
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

// mincore() says that everything is in memory to who neither owns the file nor may write it. What
// is past the end of the file never is.
bool CachedPages::kernel_tells() noexcept {
  unsigned char last = 1;
  return ::mincore(base_ + length_ - kPage, kPage, &last) == 0 && (last & 1) == 0;
}

void CachedPages::drop(uint64_t index) const noexcept {
  (void)::madvise(base_ + index * kWindow, kWindow, MADV_DONTNEED);
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
  if (!window.is(id_, index)) [[unlikely]]
    return Table::instance()->take(*this, window, index) && look(window, index, first, last);
  const uint32_t age = milliseconds() - window.looked_at.load(std::memory_order_relaxed);
  const bool has = window.has(first, last);
  if (age < (has ? kFresh : kLookAgain)) [[likely]]
    return has;
  return look(window, index, first, last);
}

bool CachedPages::look(Window& window, uint64_t index, uint64_t first, uint64_t last) noexcept {
  std::array<unsigned char, kWindowPages> found;
  if (::mincore(base_ + index * kWindow, kWindow, found.data()) != 0) return false;
  return Table::instance()->note(*this, window, index, found) &&
         std::all_of(found.begin() + static_cast<ptrdiff_t>(first),
                     found.begin() + static_cast<ptrdiff_t>(last) + 1,
                     [](unsigned char page) { return (page & 1) != 0; });
}

}  // namespace minivmm::block
