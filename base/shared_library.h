// SPDX-License-Identifier: Apache-2.0
// Libraries that are loaded when they are first needed and not linked. Loading reads files and
// wants a thread's stack: not on a fiber.
#pragma once

#include <string>

#include <atomic>
#include <mutex>

namespace minivmm::base {

class SharedLibrary {
 public:
  // `needs` says who needs what ("encryption needs GnuTLS 3.7 or later"), `package` what to
  // install. Throws ENOTSUP with both. The library stays loaded: it may register handlers that
  // outlive any use.
  SharedLibrary(const char* file, std::string needs, const char* package);

  // Throws ENOTSUP where the library has no such function.
  template <typename Function>
  void find(const char* name, Function& out) const {
    // SAFETY: POSIX has object and function pointers convertible; the type is the header's.
    out = reinterpret_cast<Function>(address_of(name));
  }
  // The same for one that only newer libraries have: null where it is missing.
  template <typename Function>
  void find_if_there(const char* name, Function& out) const noexcept {
    // SAFETY: as above.
    out = reinterpret_cast<Function>(address_if_there(name));
  }

 private:
  void* address_of(const char* name) const;
  void* address_if_there(const char* name) const noexcept;

  const char* const file_;
  const std::string needs_;
  void* handle_;
};

// A table of functions that is filled once. Any thread; a failed attempt is made again.
template <typename Table>
class LoadOnce {
 public:
  const Table& get(Table (*load)()) {
    if (!loaded_.load(std::memory_order_acquire)) [[unlikely]] {
      const std::lock_guard lock(mutex_);
      if (!loaded_.load(std::memory_order_relaxed)) {
        table_ = load();
        loaded_.store(true, std::memory_order_release);
      }
    }
    return table_;
  }

 private:
  std::mutex mutex_;
  Table table_{};  // written once, before loaded_
  std::atomic<bool> loaded_{false};
};

}  // namespace minivmm::base
