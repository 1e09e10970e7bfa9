// SPDX-License-Identifier: Apache-2.0
// The guest's data of an encrypted image, on its way to and from the disk. Metadata and compressed
// clusters are not encrypted.
//
// Method 2, LUKS: its header lies in clusters of the image that an extension of the header names; a
// sector's number is its place in the file that holds it (host offset / 512).
// Method 1, AES: the password is the key; a sector's number is its place on the guest's disk.
//
// Owned by Image. Any loop, on fibers.
#pragma once

#include <memory>
#include <optional>

#include "base/iovec.h"
#include "block/crypto/unlocked_luks.h"
#include "block/formats/qcow2/header.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

// Where the LUKS header lies. The image has one.
crypto::LuksArea luks_area(Edge& file, const Header& header);

// "aes" or "luks", as QEMU's encrypt.format. The image is encrypted.
const char* encryption_name(const Header& header) noexcept;

class Encryption {
 public:
  // Tries the password of method 2; nothing tells whether that of method 1 is right. Throws as
  // crypto::UnlockedLuks or crypto::qcow_aes_cipher. Fiber.
  Encryption(Edge& file, const Header& header, const crypto::UnlockOptions& options);

  // Where a sector lies on the guest's disk and in the file that holds it, bytes.
  struct Place {
    uint64_t guest;
    uint64_t host;
  };
  // Whole sectors. In buffers of ours: the guest may change its own meanwhile, and must not see
  // what is encrypted.
  void read(Edge& data, Place place, IoSpan to) const;
  void write(Edge& data, Place place, IoSpan from) const;

  // `file` and `header` as above. Throws EINVAL for method 1, otherwise as amend_luks1.
  void amend(Edge& file, const Header& header, const crypto::Luks1AmendOptions& options);

 private:
  void crypt(crypto::SectorCipher::Direction direction, Place place, uint64_t done,
             std::span<std::byte> piece) const;

  // One of the two.
  std::optional<crypto::UnlockedLuks> luks_;
  std::unique_ptr<crypto::SectorCipher> aes_;
};

}  // namespace minivmm::block::qcow2
