// SPDX-License-Identifier: Apache-2.0
// The memory of a request: it is read from the device into a buffer that then travels with it. A
// WRITE's data and the data of a READ's reply both begin on a page, so that a file opened with
// O_DIRECT takes them as they are. Pools belong to one loop.
//
//     | unused | request header, 80 bytes | data, 1 MiB ...        (request)
//     | unused         | reply header, 16 | data                   (reply to a READ)
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "fuse/kernel_abi.h"

namespace minivmm::fuse {

class RequestBuffer {
 public:
  // Memory is only reserved; it is there once touched. Throws base::Error(ENOMEM).
  RequestBuffer();
  RequestBuffer(const RequestBuffer&) = delete;
  RequestBuffer& operator=(const RequestBuffer&) = delete;
  ~RequestBuffer();

  // Where the device puts a request: what the kernel demands a reader to have room for.
  std::span<std::byte> request() noexcept {
    return {data() - kRequestHeader, kRequestHeader + kMaxTransfer};
  }
  std::byte* data() noexcept { return memory_ + kDataOffset; }
  std::byte* reply_header() noexcept { return data() - kReplyHeader; }
  // Gives the pages back; the next use finds zeroes.
  void release_memory() noexcept;

 private:
  static constexpr size_t kDataOffset = 4096;
  static constexpr size_t kSize = kDataOffset + kMaxTransfer;
  std::byte* memory_;
};

class BufferPool {
 public:
  // Makes the first buffer, so that one that has none in use can always give one.
  BufferPool();

  // Last in, first out: the warmest. Throws base::Error(ENOMEM).
  RequestBuffer* take();
  void give_back(RequestBuffer* buffer) noexcept;
  // Gives back the memory of all idle buffers but the `keep` warmest.
  void trim(size_t keep) noexcept;

 private:
  std::vector<std::unique_ptr<RequestBuffer>> all_;
  std::vector<RequestBuffer*> idle_;
  size_t cold_ = 0;  // the first so many of idle_ have no memory
};

}  // namespace minivmm::fuse
