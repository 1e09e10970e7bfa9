// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/unlocked_luks.h"

#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/kdf.h"
#include "block/crypto/secret.h"

namespace minivmm::block::crypto {

namespace {

// Hours would only be a way to hang.
constexpr uint64_t kMaxUnlockSeconds = 3600;

}  // namespace

UnlockOptions take_unlock_options(Options& options) {
  UnlockOptions out;
  out.key_secret = options.take_string("key-secret").value_or("");
  out.limit = std::chrono::seconds(
      options.take_uint("unlock-time", static_cast<uint64_t>(kDefaultUnlockTime.count()) / 1000, 1,
                        kMaxUnlockSeconds));
  return out;
}

const std::string& require_key_secret(const UnlockOptions& options, const std::string& prefix) {
  if (options.key_secret.empty()) {
    throw base::Error(EINVAL, fmt::format("Parameter '{}key-secret' is required for cipher: the id "
                                          "of a secret object that holds the password",
                                          prefix));
  }
  return options.key_secret;
}

UnlockedLuks::UnlockedLuks(LuksArea& area, bool holds_payload, const UnlockOptions& options,
                           const std::string& prefix)
    : header_(read_luks1(area, holds_payload)) {
  const SecureBytes password = secrets().get(require_key_secret(options, prefix));
  Luks1Key key = unlock_luks1(area, header_, password.span(), options.limit);
  cipher_ = key_pool().run(
      [&] { return std::make_unique<SectorCipher>(header_.cipher, key.master.span()); });
  master_key_ = std::move(key.master);
}

Luks1Header UnlockedLuks::header() const {
  const std::lock_guard lock(mutex_);
  return header_;
}

void UnlockedLuks::amend(LuksArea& area, const Luks1AmendOptions& options) {
  const std::lock_guard one_at_a_time(amending_);
  Luks1Header now = header();
  const auto keep = [&] {
    const std::lock_guard lock(mutex_);
    header_ = now;
  };
  try {
    amend_luks1(area, now, master_key_.span(), options);
  } catch (...) {
    keep();  // of several slots some may be erased
    throw;
  }
  keep();
}

}  // namespace minivmm::block::crypto
