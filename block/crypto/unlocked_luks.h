// SPDX-License-Identifier: Apache-2.0
// A LUKS header with the key that a password opened: what the driver `luks` and an encrypted qcow2
// image hold while they are open. Any loop.
#pragma once

#include <string>

#include <chrono>
#include <memory>
#include <mutex>

#include "base/sync.h"
#include "block/crypto/luks1_amend.h"
#include "block/crypto/luks1_header.h"
#include "block/crypto/luks1_unlock.h"
#include "block/crypto/sector_cipher.h"
#include "block/graph/options.h"

namespace minivmm::block::crypto {

// What opens an image: QEMU's key-secret, and the time that its key slots may take.
struct UnlockOptions {
  std::string key_secret;
  std::chrono::milliseconds limit = kDefaultUnlockTime;
};
// Takes key-secret and unlock-time (seconds of processor time). (For qcow2 the caller passes what
// stands under "encrypt".) Throws EINVAL.
UnlockOptions take_unlock_options(Options& options);

// The id. Throws EINVAL where there is none. `prefix` ("", "encrypt.") is for the message.
const std::string& require_key_secret(const UnlockOptions& options, const std::string& prefix);

class UnlockedLuks {
 public:
  // Reads the header and tries its key slots. Fiber. Throws EINVAL without key-secret, as
  // SecretStore::get, read_luks1 and unlock_luks1. `prefix` as above.
  UnlockedLuks(LuksArea& area, bool holds_payload, const UnlockOptions& options,
               const std::string& prefix);

  const SectorCipher& cipher() const noexcept { return *cipher_; }
  // As it is now: a copy, because passwords may be added.
  Luks1Header header() const;
  // Adds or erases passwords. Fiber; one after the other. Throws as amend_luks1.
  void amend(LuksArea& area, const Luks1AmendOptions& options);

 private:
  SecureBytes master_key_;
  std::unique_ptr<SectorCipher> cipher_;
  base::FiberMutex amending_;
  mutable std::mutex mutex_;
  Luks1Header header_;  // guarded by mutex_; changed under amending_
};

}  // namespace minivmm::block::crypto
