// SPDX-License-Identifier: Apache-2.0
// Adding and erasing passwords of a LUKS1 header, by QEMU's options of `amend`, with QEMU's words
// for what is refused.
#pragma once

#include <string>

#include <chrono>
#include <cstddef>
#include <optional>
#include <span>

#include "block/crypto/luks1_header.h"
#include "block/crypto/luks1_slots.h"
#include "block/crypto/luks_area.h"
#include "block/graph/options.h"

namespace minivmm::block::crypto {

struct Luks1AmendOptions {
  bool activate = false;        // state=active or inactive
  std::string new_secret = {};  // of the slot to be activated
  std::string old_secret = {};  // erases every slot that it opens (or only `keyslot`, if it does)
  std::optional<size_t> keyslot = std::nullopt;  // not given: the first inactive one
  std::optional<std::chrono::milliseconds> iter_time = std::nullopt;
  // Also what destroys the image: erasing the last slot, writing over an active one.
  bool force = false;
};

// Takes state, new-secret, old-secret, keyslot, iter-time. (For qcow2 the caller passes what stands
// under "encrypt".) `force` is not among them: it is a switch of the command. Throws EINVAL.
Luks1AmendOptions take_luks1_amend_options(Options& options);

// Does it; `header` is what the disk says afterwards, also after an error. Slots that erasing works
// on one after the other are refused before the first is touched. One at a time, fiber. Throws
// EINVAL, EPERM where `force` is missing, EACCES where the old secret opens nothing.
void amend_luks1(LuksArea& area, Luks1Header& header, std::span<const std::byte> master_key,
                 const Luks1AmendOptions& options);

}  // namespace minivmm::block::crypto
