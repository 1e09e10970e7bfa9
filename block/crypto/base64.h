// SPDX-License-Identifier: Apache-2.0
// Base64 (RFC 4648, section 4). Pure.
#pragma once

#include <string_view>

#include <optional>

#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {

// Line ends are passed over. Nullopt for what is not base64, or not padded to a multiple of four.
std::optional<SecureBytes> decode_base64(std::string_view text);

}  // namespace minivmm::block::crypto
