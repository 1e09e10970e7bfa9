// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/encryption.h"

#include <algorithm>

#include "base/buffer.h"

namespace minivmm::block::qcow2 {

namespace {

using Direction = crypto::SectorCipher::Direction;

// Bounds the buffer of a request.
constexpr uint64_t kPiece = 1 << 20;

}  // namespace

crypto::LuksArea luks_area(Edge& file, const Header& header) {
  return {file, header.luks->offset, header.luks->length};
}

void Encryption::read(Edge& data, uint64_t host_offset, IoSpan to) const {
  base::Buffer buffer(std::min<uint64_t>(to.bytes(), kPiece));
  for (uint64_t done = 0; done < to.bytes();) {
    const auto piece = buffer.span().first(std::min<uint64_t>(buffer.size(), to.bytes() - done));
    data.read(host_offset + done, base::SingleBuffer(piece));
    unlocked_.cipher().crypt_on_fiber(Direction::kDecrypt,
                                      (host_offset + done) / crypto::kSectorSize, piece);
    base::copy_to(to, done, piece);
    done += piece.size();
  }
}

void Encryption::write(Edge& data, uint64_t host_offset, IoSpan from) const {
  base::Buffer buffer(std::min<uint64_t>(from.bytes(), kPiece));
  for (uint64_t done = 0; done < from.bytes();) {
    const auto piece = buffer.span().first(std::min<uint64_t>(buffer.size(), from.bytes() - done));
    base::copy_from(from, done, piece);
    unlocked_.cipher().crypt_on_fiber(Direction::kEncrypt,
                                      (host_offset + done) / crypto::kSectorSize, piece);
    data.write(host_offset + done, base::SingleBuffer(piece));
    done += piece.size();
  }
}

void Encryption::amend(Edge& file, const Header& header, const crypto::Luks1AmendOptions& options) {
  crypto::LuksArea area = luks_area(file, header);
  unlocked_.amend(area, options);
}

}  // namespace minivmm::block::qcow2
