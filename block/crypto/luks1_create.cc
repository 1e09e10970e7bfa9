// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/luks1_create.h"

#include <string_view>

#include <array>
#include <cerrno>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/crypto/kdf.h"
#include "block/crypto/secret.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

// Key material begins at multiples of it, as everybody else has it.
constexpr uint64_t kMaterialAlignment = 4096;

uint64_t material_bytes(const Luks1CreateOptions& options) {
  return base::align_up(uint64_t{options.cipher.key_size()} * options.stripes, kMaterialAlignment);
}

std::string random_uuid() {
  std::array<std::byte, 16> b;
  fill_random(b);
  b[6] = (b[6] & std::byte{0x0f}) | std::byte{0x40};  // version 4: random
  b[8] = (b[8] & std::byte{0x3f}) | std::byte{0x80};
  std::string out;
  for (size_t i = 0; i < b.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) out += '-';
    out += fmt::format("{:02x}", std::to_integer<unsigned>(b[i]));
  }
  return out;
}

// Not on a fiber.
NewLuks1 compute(const Luks1CreateOptions& options) {
  NewLuks1 out;
  Luks1Header& header = out.header;
  header.cipher = options.cipher;
  header.cipher_mode = luks_cipher_mode(options.cipher);
  header.hash = options.hash;
  header.uuid = random_uuid();
  header.payload_sector = static_cast<uint32_t>(luks1_header_bytes(options) / kSectorSize);
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    const uint64_t at = kMaterialAlignment + i * material_bytes(options);
    header.slots[i].material_sector = static_cast<uint32_t>(at / kSectorSize);
    header.slots[i].stripes = options.stripes;
  }
  out.master_key = SecureBytes(header.key_size());
  fill_random(out.master_key.span());
  fill_random(header.mk_salt);
  // An eighth of a slot's time, as QEMU has it: the key itself is random already.
  const KdfSpeed speed(header.hash, KdfSpeed::Precision::kFine);
  header.mk_iterations = speed.iterations_in(options.iter_time / 8, kLuksDigest);
  pbkdf2(header.hash, out.master_key.span(), header.mk_salt, header.mk_iterations,
         header.mk_digest);
  return out;
}

}  // namespace

std::optional<std::chrono::milliseconds> take_iter_time(Options& options) {
  if (!options.has("iter-time")) return std::nullopt;
  const auto most = static_cast<uint64_t>(kMaxIterTime.count());
  return std::chrono::milliseconds(options.take_uint("iter-time", 0, 1, most));
}

Luks1CreateOptions take_luks1_create_options(Options& options) {
  Luks1CreateOptions out;
  out.key_secret = options.take_string("key-secret").value_or("");
  if (out.key_secret.empty()) {
    throw Error(EINVAL, "Parameter 'key-secret' is required for cipher: the id of a secret object");
  }
  if (const auto text = options.take_string("cipher-alg")) {
    out.cipher.algorithm = parse_cipher_algorithm(*text);
  }
  if (const auto text = options.take_string("cipher-mode")) {
    out.cipher.mode = parse_cipher_mode(*text);
  }
  if (const auto text = options.take_string("ivgen-alg")) {
    out.cipher.iv = parse_iv_generator(*text);
  }
  if (const auto text = options.take_string("ivgen-hash-alg")) {
    out.cipher.iv_hash = parse_hash(*text);
  }
  if (const auto text = options.take_string("hash-alg")) out.hash = parse_hash(*text);
  out.iter_time = take_iter_time(options).value_or(kDefaultIterTime);
  check_cipher(out.cipher);
  return out;
}

uint64_t luks1_header_bytes(const Luks1CreateOptions& options) {
  return kMaterialAlignment + kLuks1Slots * material_bytes(options);
}

NewLuks1 create_luks1(LuksArea& area, const Luks1CreateOptions& options) {
  if (area.size() < luks1_header_bytes(options)) {
    throw Error(ENOSPC, fmt::format("a LUKS header with its key slots takes {} bytes, there are {}",
                                    luks1_header_bytes(options), area.size()));
  }
  const SecureBytes password = secrets().get_text(options.key_secret);
  NewLuks1 out = key_pool().run([&] { return compute(options); });
  // An old header must not be taken for the new one with half of its slots.
  const Luks1Bytes nothing{};
  area.write(0, nothing);
  area.flush();
  Luks1Header& header = out.header;
  add_slot(area, header, 0, out.master_key.span(), password.span(), options.iter_time);
  area.write(0, encode_luks1(header));
  area.flush();
  return out;
}

}  // namespace minivmm::block::crypto
