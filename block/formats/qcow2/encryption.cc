// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/encryption.h"

#include <algorithm>
#include <cerrno>

#include "base/buffer.h"
#include "base/error.h"
#include "block/crypto/qcow_aes.h"

namespace minivmm::block::qcow2 {

namespace {

using Direction = crypto::SectorCipher::Direction;

// Bounds the buffer of a request.
constexpr uint64_t kPiece = 1 << 20;

constexpr const char* kOptionPrefix = "encrypt.";

}  // namespace

crypto::LuksArea luks_area(Edge& file, const Header& header) {
  return {file, header.luks->offset, header.luks->length};
}

const char* encryption_name(const Header& header) noexcept {
  return header.crypt_method == kCryptAes ? "aes" : "luks";
}

Encryption::Encryption(Edge& file, const Header& header, const crypto::UnlockOptions& options) {
  if (header.crypt_method == kCryptAes) {
    aes_ = crypto::qcow_aes_cipher(crypto::require_key_secret(options, kOptionPrefix));
  } else {
    crypto::LuksArea area = luks_area(file, header);
    luks_.emplace(area, false, options, kOptionPrefix);
  }
}

void Encryption::crypt(Direction direction, Place place, uint64_t done,
                       std::span<std::byte> piece) const {
  if (luks_) {
    luks_->cipher().crypt_on_fiber(direction, (place.host + done) / crypto::kSectorSize, piece);
  } else {
    aes_->crypt_on_fiber(direction, (place.guest + done) / crypto::kSectorSize, piece);
  }
}

void Encryption::read(Edge& data, Place place, IoSpan to) const {
  base::Buffer buffer(std::min<uint64_t>(to.bytes(), kPiece));
  for (uint64_t done = 0; done < to.bytes();) {
    const auto piece = buffer.span().first(std::min<uint64_t>(buffer.size(), to.bytes() - done));
    data.read(place.host + done, base::SingleBuffer(piece));
    crypt(Direction::kDecrypt, place, done, piece);
    base::copy_to(to, done, piece);
    done += piece.size();
  }
}

void Encryption::write(Edge& data, Place place, IoSpan from) const {
  base::Buffer buffer(std::min<uint64_t>(from.bytes(), kPiece));
  for (uint64_t done = 0; done < from.bytes();) {
    const auto piece = buffer.span().first(std::min<uint64_t>(buffer.size(), from.bytes() - done));
    base::copy_from(from, done, piece);
    crypt(Direction::kEncrypt, place, done, piece);
    data.write(place.host + done, base::SingleBuffer(piece));
    done += piece.size();
  }
}

void Encryption::amend(Edge& file, const Header& header, const crypto::Luks1AmendOptions& options) {
  if (!luks_) throw base::Error(EINVAL, "Only LUKS encryption options can be amended");
  crypto::LuksArea area = luks_area(file, header);
  luks_->amend(area, options);
}

}  // namespace minivmm::block::qcow2
