// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/luks1_amend.h"

#include <algorithm>
#include <cerrno>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/luks1_create.h"
#include "block/crypto/luks1_unlock.h"
#include "block/crypto/secret.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

void require(bool good, const char* text) {
  if (!good) throw Error(EINVAL, text);
}

size_t slot_to_activate(const Luks1Header& header, const Luks1AmendOptions& options) {
  if (options.keyslot) {
    if (header.slots[*options.keyslot].active && !options.force) {
      throw Error(EPERM, fmt::format("Refusing to overwrite active keyslot {} - please erase it "
                                     "first",
                                     *options.keyslot));
    }
    return *options.keyslot;
  }
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    if (!header.slots[i].active) return i;
  }
  throw Error(EINVAL, "Can't add a keyslot - all keyslots are in use");
}

void activate(LuksArea& area, Luks1Header& header, std::span<const std::byte> master_key,
              const Luks1AmendOptions& options) {
  const size_t slot = slot_to_activate(header, options);
  const SecureBytes password = secrets().get_text(options.new_secret);
  // Forced: its old password must not open it with what a cut would leave of both.
  if (header.slots[slot].active) erase_slot(area, header, slot);
  add_slot(area, header, slot, master_key, password.span(),
           options.iter_time.value_or(kDefaultIterTime));
}

bool opens(LuksArea& area, const Luks1Header& header, size_t slot, const SecureBytes& password) {
  return header.slots[slot].active && try_slot(area, header, slot, password.span()).has_value();
}

void erase_by_number(LuksArea& area, Luks1Header& header, const Luks1AmendOptions& options) {
  const size_t slot = *options.keyslot;
  if (!options.old_secret.empty() &&
      !opens(area, header, slot, secrets().get(options.old_secret))) {
    throw Error(EACCES, fmt::format("Given keyslot {} doesn't contain the given old password for "
                                    "erase operation",
                                    slot));
  }
  if (!header.slots[slot].active) {
    if (options.force) return;
    throw Error(EINVAL, fmt::format("Given keyslot {} is already erased (inactive)", slot));
  }
  if (header.active_slots() == 1 && !options.force) {
    throw Error(EPERM, fmt::format("Attempt to erase the only active keyslot {} which will erase "
                                   "all the data in the image irreversibly - refusing operation",
                                   slot));
  }
  erase_slot(area, header, slot);
}

void erase_by_password(LuksArea& area, Luks1Header& header, const Luks1AmendOptions& options) {
  const SecureBytes password = secrets().get(options.old_secret);
  std::vector<size_t> matching;
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    if (opens(area, header, i, password)) matching.push_back(i);
  }
  if (matching.empty()) {
    throw Error(EACCES, "No keyslots match given (old) password for erase operation");
  }
  if (matching.size() == header.active_slots() && !options.force) {
    throw Error(EPERM,
                "All the active keyslots match the (old) password that was given and erasing them "
                "will erase all the data in the image irreversibly - refusing operation");
  }
  for (const size_t slot : matching) erase_slot(area, header, slot);
}

}  // namespace

Luks1AmendOptions take_luks1_amend_options(Options& options) {
  Luks1AmendOptions out;
  require(options.has("state"), "Parameter 'state' is missing");
  out.activate = options.take_choice("state", {"active", "inactive"}, 0) == 0;
  out.new_secret = options.take_string("new-secret").value_or("");
  out.old_secret = options.take_string("old-secret").value_or("");
  if (options.has("keyslot")) out.keyslot = options.take_uint("keyslot", 0, 0, kLuks1Slots - 1);
  out.iter_time = take_iter_time(options);
  if (out.activate) {
    require(!out.new_secret.empty(), "'new-secret' is required to activate a keyslot");
    require(out.old_secret.empty(), "'old-secret' must not be given when activating keyslots");
  } else {
    require(out.new_secret.empty(), "'new-secret' must not be given when erasing keyslots");
    require(!out.iter_time, "'iter-time' must not be given when erasing keyslots");
    require(out.keyslot.has_value() || !out.old_secret.empty(),
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given");
  }
  return out;
}

void amend_luks1(LuksArea& area, Luks1Header& header, std::span<const std::byte> master_key,
                 const Luks1AmendOptions& options) {
  if (options.activate) {
    activate(area, header, master_key, options);
  } else if (options.keyslot) {
    erase_by_number(area, header, options);
  } else {
    erase_by_password(area, header, options);
  }
}

}  // namespace minivmm::block::crypto
