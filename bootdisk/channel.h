// SPDX-License-Identifier: Apache-2.0
// The socket between a process that has a disk and the one that looks for a kernel on it, and what
// is said on it. Both are the same program, so integers are in the machine's order.
//
//   parent  Terms
//   child   Message kRead, answered by an int32 errno and, where that is 0, the bytes
//   child   Message kNote with a text, any number of them
//   child   one of kFound (origin, title, arguments, "initrd" or "", each ended by a NUL),
//           kNothing, kFailed (a text)
//
// Before kFound the kernel and the joined initrds were written to the descriptors kKernelFd and
// kInitrdFd.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::bootdisk {

// The first word of the child's command line, and the descriptors that it is given.
inline constexpr const char* kFinderCommand = "find-kernel";
inline constexpr int kChannelFd = 3;
inline constexpr int kKernelFd = 4;
inline constexpr int kInitrdFd = 5;

struct Terms {
  uint64_t disk_size;  // bytes
  uint64_t limit;      // of the kernel and of the initrds, bytes each
};

enum class Kind : uint32_t { kRead = 1, kNote, kFound, kNothing, kFailed };

struct Message {
  Kind kind;
  uint32_t length;  // of what is read, or of the text that follows; bytes
  uint64_t offset;  // kRead
};

inline constexpr uint32_t kMaxRead = 1 << 20;
inline constexpr uint32_t kMaxText = 64 << 10;

// Whole messages on a blocking stream socket, which it does not own. Throws base::Error: EPIPE
// when the other side is gone (SIGPIPE is ignored in the whole program), ETIMEDOUT when the socket
// has a time limit. Plain read and write: the child's filter of system calls has no others.
class Channel {
 public:
  explicit Channel(int fd) noexcept : fd_(fd) {}

  void send(std::span<const std::byte> bytes);
  void receive(std::span<std::byte> bytes);

  template <typename T>
  void send_value(const T& value) {
    send(std::as_bytes(std::span<const T, 1>(&value, 1)));
  }
  template <typename T>
  T receive_value() {
    T value{};
    receive(std::as_writable_bytes(std::span<T, 1>(&value, 1)));
    return value;
  }
  // The text is cut at kMaxText.
  void send_text(Kind kind, std::string_view text);

 private:
  int fd_;
};

}  // namespace minivmm::bootdisk
