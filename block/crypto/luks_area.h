// SPDX-License-Identifier: Apache-2.0
// Where a LUKS header and its key material lie: a part of a node. Offsets are from the beginning of
// the header. Borrows the edge; fiber.
//
// The driver `luks` has it at the beginning of its file. qcow2 has it in clusters of the image: the
// full disk encryption header extension (0x0537be77) holds their offset and the length. Its use
// there:
//
//   opening   LuksArea area(file_edge, extension.offset, extension.length);
//             Luks1Header header = read_luks1(area, false);
//             Luks1Key key = unlock_luks1(area, header, secrets().get(key_secret).span());
//             SectorCipher cipher(header.cipher, key.master.span()) in key_pool(): see
//             sector_cipher.h for the numbers of sectors
//   creating  allocate luks1_header_bytes(options) rounded up to clusters, zero them, write the
//             extension with that length and set crypt_method to 2 before create_luks1(area,
//             options)
//   amending  amend_luks1 with the key that opening left; nothing else of the image changes
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "block/graph/edge.h"

namespace minivmm::block::crypto {

class LuksArea {
 public:
  LuksArea(Edge& file, uint64_t offset, uint64_t size) noexcept
      : file_(file), offset_(offset), size_(size) {}

  uint64_t size() const noexcept { return size_; }
  // Throw what the edge throws. The range lies inside; reading past the end of the file gives
  // zeroes.
  void read(uint64_t offset, std::span<std::byte> to) {
    file_.read(offset_ + offset, base::SingleBuffer(to));
  }
  void write(uint64_t offset, std::span<const std::byte> from) {
    file_.write(offset_ + offset, base::SingleBuffer(from));
  }
  // What was written is durable.
  void flush() { file_.flush(); }

 private:
  Edge& file_;
  const uint64_t offset_;
  const uint64_t size_;
};

}  // namespace minivmm::block::crypto
