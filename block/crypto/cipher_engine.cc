// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/cipher_engine.h"

#include <cstdint>
#include <cstring>

#include "base/bytes.h"
#include "block/crypto/gnutls.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {
namespace {

gnutls_cipher_hd_t native(void* handle) noexcept { return static_cast<gnutls_cipher_hd_t>(handle); }

// What GnuTLS does as it stands.
class PlainEngine final : public CipherEngine {
 public:
  PlainEngine(int algorithm, std::span<const std::byte> key) : cipher_(algorithm, key) {}
  void encrypt(const Iv& iv, std::span<std::byte> data) override { cipher_.encrypt(iv, data); }
  void decrypt(const Iv& iv, std::span<std::byte> data) override { cipher_.decrypt(iv, data); }

 private:
  CipherHandle cipher_;
};

void xor_into(std::span<std::byte> data, const Iv& other) noexcept {
  for (size_t i = 0; i < kAesBlock; ++i) data[i] ^= other[i];
}

// Times x in GF(2^128), as XTS has it: little-endian, modulo x^128 + x^7 + x^2 + x + 1.
void next_tweak(Iv& tweak) noexcept {
  const auto low = base::load_le<uint64_t>(tweak.data());
  const auto high = base::load_le<uint64_t>(tweak.data() + 8);
  const uint64_t reduce = (high >> 63) != 0 ? 0x87 : 0;
  base::store_le<uint64_t>(tweak.data(), (low << 1) ^ reduce);
  base::store_le<uint64_t>(tweak.data() + 8, (high << 1) | (low >> 63));
}

// XTS made of single blocks: GnuTLS has it for AES-128 and AES-256 only. CBC of one block with an
// IV of zeroes is that block encrypted. Slow, and right.
class XtsOfBlocks final : public CipherEngine {
 public:
  explicit XtsOfBlocks(std::span<const std::byte> key)
      : data_(aes_cbc_of(key.size() / 2), key.first(key.size() / 2)),
        tweak_(aes_cbc_of(key.size() / 2), key.last(key.size() / 2)) {}

  void encrypt(const Iv& iv, std::span<std::byte> data) override {
    each_block(iv, data, [&](std::span<std::byte> block) { data_.encrypt(kZero, block); });
  }
  void decrypt(const Iv& iv, std::span<std::byte> data) override {
    each_block(iv, data, [&](std::span<std::byte> block) { data_.decrypt(kZero, block); });
  }

 private:
  static constexpr Iv kZero{};

  template <typename Step>
  void each_block(const Iv& iv, std::span<std::byte> data, Step&& step) {
    Iv tweak = iv;
    tweak_.encrypt(kZero, tweak);
    for (size_t at = 0; at + kAesBlock <= data.size(); at += kAesBlock) {
      const auto block = data.subspan(at, kAesBlock);
      xor_into(block, tweak);
      step(block);
      xor_into(block, tweak);
      next_tweak(tweak);
    }
    wipe(tweak);
  }

  CipherHandle data_;
  CipherHandle tweak_;
};

}  // namespace

CipherHandle::CipherHandle(int algorithm, std::span<const std::byte> key) {
  // SAFETY: GnuTLS only reads the key.
  const gnutls_datum_t datum{reinterpret_cast<unsigned char*>(const_cast<std::byte*>(key.data())),
                             static_cast<unsigned>(key.size())};
  gnutls_cipher_hd_t handle = nullptr;
  require_success(gnutls().cipher_init(&handle, static_cast<gnutls_cipher_algorithm_t>(algorithm),
                                       &datum, nullptr),
                  "cipher key");
  handle_ = handle;
}

CipherHandle::~CipherHandle() { gnutls().cipher_deinit(native(handle_)); }

void CipherHandle::encrypt(const Iv& iv, std::span<std::byte> data) {
  const Gnutls& library = gnutls();
  library.cipher_set_iv(native(handle_), const_cast<std::byte*>(iv.data()), iv.size());
  require_success(
      library.cipher_encrypt2(native(handle_), data.data(), data.size(), data.data(), data.size()),
      "encrypt");
}

void CipherHandle::decrypt(const Iv& iv, std::span<std::byte> data) {
  const Gnutls& library = gnutls();
  library.cipher_set_iv(native(handle_), const_cast<std::byte*>(iv.data()), iv.size());
  require_success(
      library.cipher_decrypt2(native(handle_), data.data(), data.size(), data.data(), data.size()),
      "decrypt");
}

int aes_cbc_of(size_t key_size) noexcept {
  switch (key_size) {
    case 16:
      return GNUTLS_CIPHER_AES_128_CBC;
    case 24:
      return GNUTLS_CIPHER_AES_192_CBC;
    default:
      return GNUTLS_CIPHER_AES_256_CBC;
  }
}

std::unique_ptr<CipherEngine> make_engine(const CipherSpec& spec, std::span<const std::byte> key) {
  if (spec.mode == CipherMode::kCbc) {
    return std::make_unique<PlainEngine>(aes_cbc_of(key.size()), key);
  }
  switch (spec.algorithm) {
    case CipherAlgorithm::kAes128:
      return std::make_unique<PlainEngine>(GNUTLS_CIPHER_AES_128_XTS, key);
    case CipherAlgorithm::kAes192:
      return std::make_unique<XtsOfBlocks>(key);
    default:
      return std::make_unique<PlainEngine>(GNUTLS_CIPHER_AES_256_XTS, key);
  }
}

}  // namespace minivmm::block::crypto
