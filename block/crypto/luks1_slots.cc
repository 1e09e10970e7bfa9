// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/luks1_slots.h"

#include "block/crypto/af_split.h"
#include "block/crypto/kdf.h"
#include "block/crypto/sector_cipher.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {
namespace {

// A slot's new secrets, computed apart from the disk.
struct NewSlot {
  LuksSalt salt{};
  uint32_t iterations = 0;
  SecureBytes material;  // encrypted, whole sectors
};

// Not on a fiber.
NewSlot compute_slot(const Luks1Header& header, const Luks1Slot& slot,
                     std::span<const std::byte> master_key, std::span<const std::byte> password,
                     std::chrono::milliseconds iter_time) {
  NewSlot out;
  const KdfSpeed speed(header.hash, KdfSpeed::Precision::kFine);
  out.iterations = speed.iterations_in(iter_time, header.key_size());
  fill_random(out.salt);
  SecureBytes slot_key(header.key_size());
  pbkdf2(header.hash, password, out.salt, out.iterations, slot_key.span());
  out.material = SecureBytes(header.material_size(slot));
  af_split(header.hash, master_key, slot.stripes,
           out.material.span().first(header.key_size() * slot.stripes));
  SectorCipher(header.cipher, slot_key.span()).encrypt(0, out.material.span());
  return out;
}

// One entry of the table, as `slot` says.
void write_entry(LuksArea& area, const Luks1Header& header, size_t slot) {
  const Luks1Bytes bytes = encode_luks1(header);
  const size_t at = kLuks1SlotAt + slot * kLuks1SlotSize;
  area.write(at, std::span(bytes).subspan(at, kLuks1SlotSize));
}

// Only whether it is active: one word, in one sector.
void write_state(LuksArea& area, const Luks1Header& header, size_t slot) {
  const Luks1Bytes bytes = encode_luks1(header);
  const size_t at = kLuks1SlotAt + slot * kLuks1SlotSize;
  area.write(at, std::span(bytes).subspan(at, sizeof(uint32_t)));
}

}  // namespace

void add_slot(LuksArea& area, Luks1Header& header, size_t number,
              std::span<const std::byte> master_key, std::span<const std::byte> password,
              std::chrono::milliseconds iter_time) {
  const NewSlot fresh = key_pool().run(
      [&] { return compute_slot(header, header.slots[number], master_key, password, iter_time); });
  Luks1Header changed = header;
  Luks1Slot& slot = changed.slots[number];
  slot.active = false;
  slot.salt = fresh.salt;
  slot.iterations = fresh.iterations;
  area.write(slot.material_offset(), fresh.material.span());
  area.flush();
  write_entry(area, changed, number);
  area.flush();
  slot.active = true;
  write_state(area, changed, number);
  area.flush();
  header = std::move(changed);
}

void erase_slot(LuksArea& area, Luks1Header& header, size_t number) {
  const Luks1Slot& slot = header.slots[number];
  // Once: repeating it does nothing more for what a disk, an SSD or a file system that writes
  // elsewhere keeps of old sectors, and the split makes the key depend on every byte.
  SecureBytes noise(header.material_size(slot));
  key_pool().run([&] { fill_random(noise.span()); });
  area.write(slot.material_offset(), noise.span());
  area.flush();
  Luks1Header changed = header;
  changed.slots[number].active = false;
  write_state(area, changed, number);
  area.flush();
  header = changed;
  // What is left of the entry says nothing about a key, and means nothing.
  changed.slots[number].iterations = 0;
  changed.slots[number].salt = {};
  write_entry(area, changed, number);
  area.flush();
  header = std::move(changed);
}

}  // namespace minivmm::block::crypto
