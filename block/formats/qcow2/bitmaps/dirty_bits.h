// SPDX-License-Identifier: Apache-2.0
// The bits of one dirty bitmap in memory: bit n stands for the bytes of the disk from
// n << granularity_bits on. In chunks that exist where a bit was set; a chunk that is dirty as a
// whole takes no memory either, so that what an image file says costs no more than it holds.
//
// mark() and the readers: any thread, at once. The others: beside mark() and readers, but not
// beside each other; a mark that comes at the same time may be lost to clear().
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace minivmm::block::qcow2 {

class DirtyBits {
 public:
  // The caller bounds the number of bits.
  DirtyBits(uint64_t disk_size, unsigned granularity_bits);
  ~DirtyBits();
  DirtyBits(const DirtyBits&) = delete;
  DirtyBits& operator=(const DirtyBits&) = delete;

  uint64_t disk_size() const noexcept { return disk_size_; }
  unsigned granularity_bits() const noexcept { return granularity_bits_; }
  uint64_t data_bytes() const noexcept { return (bits_ + 7) / 8; }

  // What lies past the end is left out.
  void mark(uint64_t offset, uint64_t length);
  struct Run {
    uint64_t length = 0;
    bool dirty = false;
  };
  // How far from `offset` on, at most `max` bytes, it is the same. Both inside the disk.
  Run run_at(uint64_t offset, uint64_t max) const;
  // Bits that are set; those that are being set count or do not.
  uint64_t count() const noexcept;

  void clear() noexcept;
  // Adds what is dirty in another one, as far as this one reaches.
  void merge(const DirtyBits& other);

  // --- As an image stores it: bit 0 of byte 0 is the first ---
  // Adds the bits of bytes from `at` on.
  void load(uint64_t at, std::span<const std::byte> bytes);
  void load_ones(uint64_t at, uint64_t length);
  // Bits past the end are 0.
  void store(uint64_t at, std::span<std::byte> bytes) const;

 private:
  static constexpr uint64_t kChunkBits = 32768;
  static constexpr uint64_t kWords = kChunkBits / 64;
  struct Chunk {
    std::atomic<uint64_t> words[kWords];
  };
  static Chunk& full() noexcept;  // stands for a chunk of ones

  uint64_t word(uint64_t index) const noexcept;
  void set(uint64_t first, uint64_t end);
  void set_in_chunk(uint64_t index, uint64_t first, uint64_t end);
  Chunk* chunk_for_change(uint64_t index);
  uint64_t find(uint64_t first, uint64_t end, bool value) const noexcept;

  const uint64_t disk_size_;
  const unsigned granularity_bits_;
  const uint64_t bits_;
  const uint64_t chunk_count_;
  std::unique_ptr<std::atomic<Chunk*>[]> chunks_;
};

}  // namespace minivmm::block::qcow2
