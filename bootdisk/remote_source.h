// SPDX-License-Identifier: Apache-2.0
// A disk that another process reads for us. Keeps a few large pieces, because file systems are read
// in small ones.
#pragma once

#include <cstdint>
#include <list>
#include <vector>

#include "bootdisk/byte_source.h"
#include "bootdisk/channel.h"

namespace minivmm::bootdisk {

class RemoteSource final : public ByteSource {
 public:
  RemoteSource(Channel& channel, uint64_t size) : channel_(channel), size_(size) {}

  uint64_t size() const noexcept override { return size_; }
  void read(uint64_t offset, std::span<std::byte> out) override;

 private:
  static constexpr uint64_t kPiece = 256 << 10;  // bytes, and their alignment
  static constexpr size_t kPieces = 32;

  struct Piece {
    uint64_t offset;
    std::vector<std::byte> bytes;
  };
  const Piece& piece(uint64_t offset);
  void fetch(uint64_t offset, std::span<std::byte> out);

  Channel& channel_;
  const uint64_t size_;
  std::list<Piece> pieces_;  // the last used first
};

}  // namespace minivmm::bootdisk
