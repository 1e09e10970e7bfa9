// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/sector_cipher.h"

#include <utility>

#include "base/bytes.h"
#include "base/pool.h"
#include "block/crypto/hash.h"

namespace minivmm::block::crypto {
namespace {

// A hand-off to the pool and back costs 2 to 5 us, which AES needs for about 16 KiB.
constexpr size_t kInlineBytes = 16 * 1024;
// More are freed rather than kept: as many as threads that may crypt at once on most machines.
constexpr size_t kMostIdle = 16;

}  // namespace

struct SectorCipher::Engine {
  std::unique_ptr<CipherEngine> data;
  std::unique_ptr<CipherHandle> iv;  // of essiv

  Iv make_iv(IvGenerator kind, uint64_t sector) const {
    Iv out{};
    base::store_le<uint64_t>(out.data(),
                             kind == IvGenerator::kPlain ? sector & 0xffffffff : sector);
    if (iv) {
      static constexpr Iv kZero{};
      iv->encrypt(kZero, out);
    }
    return out;
  }
};

class SectorCipher::Borrowed {
 public:
  explicit Borrowed(const SectorCipher& owner) : owner_(owner) {
    {
      const std::lock_guard lock(owner.mutex_);
      if (!owner.idle_.empty()) {
        engine_ = std::move(owner.idle_.back());
        owner.idle_.pop_back();
      }
    }
    if (engine_) return;
    engine_ = std::make_unique<Engine>();
    engine_->data = make_engine(owner.spec_, owner.key_.span());
    if (owner.spec_.iv == IvGenerator::kEssiv) {
      engine_->iv =
          std::make_unique<CipherHandle>(aes_cbc_of(owner.iv_key_.size()), owner.iv_key_.span());
    }
  }
  ~Borrowed() {
    const std::lock_guard lock(owner_.mutex_);
    if (owner_.idle_.size() < kMostIdle) owner_.idle_.push_back(std::move(engine_));
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Engine& operator*() const noexcept { return *engine_; }

 private:
  const SectorCipher& owner_;
  std::unique_ptr<Engine> engine_;
};

SectorCipher::SectorCipher(const CipherSpec& spec, std::span<const std::byte> key)
    : spec_(spec), key_(key) {
  idle_.reserve(kMostIdle);
  if (spec.iv == IvGenerator::kEssiv) {
    iv_key_ = SecureBytes(digest_size(spec.iv_hash));
    Hasher hasher(spec.iv_hash);
    hasher.add(key);
    hasher.finish(iv_key_.span());
  }
  const Borrowed first(*this);  // says now what is wrong with the key
}

SectorCipher::~SectorCipher() = default;

void SectorCipher::crypt(Direction direction, uint64_t first_sector,
                         std::span<std::byte> data) const {
  const Borrowed borrowed(*this);
  Engine& engine = *borrowed;
  uint64_t sector = first_sector;
  for (size_t at = 0; at + kSectorSize <= data.size(); at += kSectorSize, ++sector) {
    const Iv iv = engine.make_iv(spec_.iv, sector);
    const auto piece = data.subspan(at, kSectorSize);
    if (direction == Direction::kEncrypt) {
      engine.data->encrypt(iv, piece);
    } else {
      engine.data->decrypt(iv, piece);
    }
  }
}

void SectorCipher::encrypt(uint64_t first_sector, std::span<std::byte> data) const {
  crypt(Direction::kEncrypt, first_sector, data);
}
void SectorCipher::decrypt(uint64_t first_sector, std::span<std::byte> data) const {
  crypt(Direction::kDecrypt, first_sector, data);
}

void SectorCipher::crypt_on_fiber(Direction direction, uint64_t first_sector,
                                  std::span<std::byte> data) const {
  if (data.size() <= kInlineBytes) {
    crypt(direction, first_sector, data);
  } else {
    base::Pool::work().run([&] { crypt(direction, first_sector, data); });
  }
}

}  // namespace minivmm::block::crypto
