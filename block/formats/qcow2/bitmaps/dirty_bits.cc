// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/bitmaps/dirty_bits.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/checked.h"

namespace minivmm::block::qcow2 {

static_assert(std::endian::native == std::endian::little,
              "the bytes of an image are those of the words in memory");

namespace {

// Bits [first, end) of a word; end is 1 to 64.
uint64_t mask_of(uint64_t first, uint64_t end) noexcept {
  return (~uint64_t{0} << first) & (~uint64_t{0} >> (64 - end));
}

}  // namespace

DirtyBits::DirtyBits(uint64_t disk_size, unsigned granularity_bits)
    : disk_size_(disk_size),
      granularity_bits_(granularity_bits),
      bits_(base::div_ceil(disk_size, uint64_t{1} << granularity_bits)),
      chunk_count_(base::div_ceil(bits_, kChunkBits)),
      chunks_(std::make_unique<std::atomic<Chunk*>[]>(chunk_count_)) {}

DirtyBits::~DirtyBits() {
  for (uint64_t i = 0; i < chunk_count_; ++i) {
    if (Chunk* chunk = chunks_[i].load(); chunk != &full()) delete chunk;
  }
}

DirtyBits::Chunk& DirtyBits::full() noexcept {
  static Chunk chunk{};
  return chunk;
}

uint64_t DirtyBits::word(uint64_t index) const noexcept {
  const Chunk* chunk = chunks_[index / kWords].load(std::memory_order_acquire);
  if (chunk == nullptr) return 0;
  if (chunk == &full()) return ~uint64_t{0};
  return chunk->words[index % kWords].load(std::memory_order_relaxed);
}

// nullptr: all of it is set.
DirtyBits::Chunk* DirtyBits::chunk_for_change(uint64_t index) {
  Chunk* found = chunks_[index].load(std::memory_order_acquire);
  if (found == nullptr) {
    auto fresh = std::make_unique<Chunk>();
    if (chunks_[index].compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel)) {
      return fresh.release();
    }
  }
  return found == &full() ? nullptr : found;
}

uint64_t DirtyBits::count() const noexcept {
  uint64_t out = 0;
  for (uint64_t i = 0; i < chunk_count_; ++i) {
    const Chunk* chunk = chunks_[i].load(std::memory_order_acquire);
    if (chunk == &full()) {
      out += std::min(kChunkBits, bits_ - i * kChunkBits);
    } else if (chunk != nullptr) {
      for (const auto& word : chunk->words) {
        out += static_cast<uint64_t>(std::popcount(word.load(std::memory_order_relaxed)));
      }
    }
  }
  return out;
}

void DirtyBits::mark(uint64_t offset, uint64_t length) {
  if (length == 0 || offset >= disk_size_) return;
  const uint64_t last = offset + std::min(length, disk_size_ - offset) - 1;
  set(offset >> granularity_bits_, (last >> granularity_bits_) + 1);
}

void DirtyBits::set(uint64_t first, uint64_t end) {
  while (first < end) {
    const uint64_t index = first / kChunkBits;
    const uint64_t stop = std::min(end, (index + 1) * kChunkBits);
    set_in_chunk(index, first % kChunkBits, stop - index * kChunkBits);
    first = stop;
  }
}

void DirtyBits::set_in_chunk(uint64_t index, uint64_t first, uint64_t end) {
  Chunk* absent = nullptr;
  if (first == 0 && end == kChunkBits &&
      chunks_[index].compare_exchange_strong(absent, &full(), std::memory_order_acq_rel)) {
    return;
  }
  Chunk* const chunk = chunk_for_change(index);
  if (chunk == nullptr) return;
  for (uint64_t w = first / 64; w * 64 < end; ++w) {
    const uint64_t from = std::max(first, w * 64) - w * 64;
    const uint64_t mask = mask_of(from, std::min<uint64_t>(end - w * 64, 64));
    // Mostly it is set already: then the cache line stays shared.
    if ((chunk->words[w].load(std::memory_order_relaxed) & mask) != mask) {
      chunk->words[w].fetch_or(mask, std::memory_order_relaxed);
    }
  }
}

// The first bit of [first, end) that has the value, or `end`.
uint64_t DirtyBits::find(uint64_t first, uint64_t end, bool value) const noexcept {
  while (first < end) {
    const uint64_t index = first / 64;
    const Chunk* chunk = chunks_[index / kWords].load(std::memory_order_acquire);
    if ((chunk == nullptr && value) || (chunk == &full() && !value)) {
      first = (first / kChunkBits + 1) * kChunkBits;
      continue;
    }
    const uint64_t bits = (value ? word(index) : ~word(index)) & (~uint64_t{0} << (first % 64));
    if (bits != 0) {
      return std::min(end, index * 64 + static_cast<uint64_t>(std::countr_zero(bits)));
    }
    first = (index + 1) * 64;
  }
  return end;
}

DirtyBits::Run DirtyBits::run_at(uint64_t offset, uint64_t max) const {
  const uint64_t first = offset >> granularity_bits_;
  const uint64_t end = ((offset + max - 1) >> granularity_bits_) + 1;
  const bool dirty = ((word(first / 64) >> (first % 64)) & 1) != 0;
  const uint64_t change = find(first, end, !dirty);
  return {change == end ? max : std::min(max, (change << granularity_bits_) - offset), dirty};
}

void DirtyBits::clear() noexcept {
  for (uint64_t i = 0; i < chunk_count_; ++i) {
    Chunk* chunk = chunks_[i].load(std::memory_order_acquire);
    if (chunk == nullptr) continue;
    if (chunk == &full()) {
      chunks_[i].store(nullptr, std::memory_order_release);
      continue;
    }
    // It stays: somebody may be about to mark in it.
    for (auto& word : chunk->words) word.store(0, std::memory_order_relaxed);
  }
}

void DirtyBits::merge(const DirtyBits& other) {
  const uint64_t end = std::min(disk_size_, other.disk_size_);
  for (uint64_t at = 0; at < end;) {
    const Run run = other.run_at(at, end - at);
    if (run.dirty) mark(at, run.length);
    at += run.length;
  }
}

void DirtyBits::load(uint64_t at, std::span<const std::byte> bytes) {
  for (size_t i = 0; i < bytes.size();) {
    uint64_t word = 0;
    const size_t now = std::min<size_t>(8 - (at + i) % 8, bytes.size() - i);
    std::memcpy(reinterpret_cast<std::byte*>(&word) + (at + i) % 8, bytes.data() + i, now);
    const uint64_t index = (at + i) / 8;
    i += now;
    if (index * 64 >= bits_) return;
    if (bits_ - index * 64 < 64) word &= mask_of(0, bits_ - index * 64);
    if (word == 0) continue;
    if (Chunk* chunk = chunk_for_change(index / kWords)) {
      chunk->words[index % kWords].fetch_or(word, std::memory_order_relaxed);
    }
  }
}

void DirtyBits::load_ones(uint64_t at, uint64_t length) {
  set(std::min(at * 8, bits_), std::min((at + length) * 8, bits_));
}

void DirtyBits::store(uint64_t at, std::span<std::byte> bytes) const {
  std::fill(bytes.begin(), bytes.end(), std::byte{0});
  for (size_t i = 0; i < bytes.size();) {
    const uint64_t index = (at + i) / 8;
    const size_t now = std::min<size_t>(8 - (at + i) % 8, bytes.size() - i);
    if (index * 64 >= bits_) return;
    uint64_t bits = word(index);
    if (bits_ - index * 64 < 64) bits &= mask_of(0, bits_ - index * 64);
    std::memcpy(bytes.data() + i, reinterpret_cast<const std::byte*>(&bits) + (at + i) % 8, now);
    i += now;
  }
}

}  // namespace minivmm::block::qcow2
