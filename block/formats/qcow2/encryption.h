// SPDX-License-Identifier: Apache-2.0
// The guest's data of an encrypted image (encryption method 2, LUKS), on its way to and from the
// disk. The LUKS header lies in clusters of the image that an extension of the header names; a
// sector's number is its place in the file that holds it (host offset / 512). Metadata and
// compressed clusters are not encrypted.
//
// Owned by Image. Any loop, on fibers.
#pragma once

#include "base/iovec.h"
#include "block/crypto/unlocked_luks.h"
#include "block/formats/qcow2/header.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

// Where the LUKS header lies. The image has one.
crypto::LuksArea luks_area(Edge& file, const Header& header);

class Encryption {
 public:
  // Tries the password. Throws as crypto::UnlockedLuks.
  Encryption(Edge& file, const Header& header, const crypto::UnlockOptions& options)
      : Encryption(luks_area(file, header), options) {}

  // Whole sectors. In buffers of ours: the guest may change its own meanwhile, and must not see
  // what is encrypted.
  void read(Edge& data, uint64_t host_offset, IoSpan to) const;
  void write(Edge& data, uint64_t host_offset, IoSpan from) const;

  crypto::Luks1Header luks_header() const { return unlocked_.header(); }
  // `file` and `header` as above. Throws as amend_luks1.
  void amend(Edge& file, const Header& header, const crypto::Luks1AmendOptions& options);

 private:
  Encryption(crypto::LuksArea area, const crypto::UnlockOptions& options)
      : unlocked_(area, false, options, "encrypt.") {}

  crypto::UnlockedLuks unlocked_;
};

}  // namespace minivmm::block::qcow2
