// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/l1_table.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/bytes.h"

namespace minivmm::block::qcow2 {

L1Table::L1Table(ImageFile& image)
    : image_(image),
      size_(image.header().l1_size),
      offset_(image.header().l1_offset),
      owned_(std::make_unique<std::atomic<uint64_t>[]>(size_)),
      entries_(owned_.get()) {
  constexpr size_t kPiece = 1 << 20;
  const uint64_t bytes = uint64_t{size()} * 8;
  base::Buffer buffer(std::min<uint64_t>(bytes, kPiece));
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t now = std::min<uint64_t>(kPiece, bytes - done);
    image.file().read(offset_ + done, base::SingleBuffer(buffer.data(), now));
    for (uint64_t i = 0; i < now; i += 8) {
      owned_[(done + i) / 8].store(base::load_be<uint64_t>(buffer.data() + i),
                                   std::memory_order_relaxed);
    }
    done += now;
  }
}

void L1Table::set(uint64_t index, uint64_t value) {
  const std::lock_guard lock(mutex_);
  owned_[index].store(value, std::memory_order_release);
  dirty_.push_back(static_cast<uint32_t>(index));
}

L1Table::Changes L1Table::take_dirty() {
  Changes out;
  const std::lock_guard lock(mutex_);
  std::sort(dirty_.begin(), dirty_.end());
  dirty_.erase(std::unique(dirty_.begin(), dirty_.end()), dirty_.end());
  for (const uint32_t index : dirty_) {
    out.emplace_back(index, owned_[index].load(std::memory_order_relaxed));
  }
  dirty_.clear();
  return out;
}

void L1Table::write(const Changes& changes) {
  std::vector<std::byte> bytes;
  for (size_t i = 0; i < changes.size();) {
    const uint32_t first = changes[i].first;
    bytes.clear();
    do {
      bytes.resize(bytes.size() + 8);
      base::store_be(bytes.data() + bytes.size() - 8, changes[i].second);
      ++i;
    } while (i < changes.size() && changes[i].first == first + bytes.size() / 8);
    image_.file().write(offset_ + uint64_t{first} * 8,
                        base::SingleBuffer(std::span<const std::byte>(bytes)));
  }
}

void L1Table::failed(const Changes& changes) {
  const std::lock_guard lock(mutex_);
  for (const auto& change : changes) dirty_.push_back(change.first);
}

// What is in memory may not be copied: entries that were set since the last commit point to tables
// whose refcounts are not durable. They stay marked as changed, and the next commit writes them.
void L1Table::write_copy(uint64_t offset, uint32_t size) {
  constexpr uint64_t kPiece = 1 << 20;
  const uint64_t old_bytes = uint64_t{this->size()} * 8;
  const uint64_t bytes = uint64_t{size} * 8;
  base::Buffer buffer(std::min(bytes, kPiece));
  for (uint64_t done = offset == offset_ ? old_bytes : 0; done < bytes;) {
    const uint64_t now = std::min(kPiece, bytes - done);
    const uint64_t copied = done < old_bytes ? std::min(now, old_bytes - done) : 0;
    if (copied != 0) {
      image_.file().read(offset_ + done, base::SingleBuffer(buffer.data(), copied));
    }
    std::fill_n(buffer.data() + copied, now - copied, std::byte{0});
    image_.file().write(offset + done, base::SingleBuffer(buffer.data(), now));
    done += now;
  }
}

L1Table::Entries L1Table::move(uint64_t offset, Entries larger, uint32_t size) {
  const std::lock_guard lock(mutex_);
  for (uint32_t i = 0; i < this->size(); ++i) {
    larger[i].store(owned_[i].load(std::memory_order_relaxed), std::memory_order_relaxed);
  }
  entries_.store(larger.get(), std::memory_order_release);
  std::swap(owned_, larger);
  offset_ = offset;
  size_.store(size, std::memory_order_release);
  return larger;
}

void L1Table::replace(uint64_t offset, const std::vector<uint64_t>& entries) {
  auto array = std::make_unique<std::atomic<uint64_t>[]>(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) array[i].store(entries[i], std::memory_order_relaxed);
  const std::lock_guard lock(mutex_);
  entries_.store(array.get(), std::memory_order_release);
  owned_ = std::move(array);
  offset_ = offset;
  size_.store(static_cast<uint32_t>(entries.size()), std::memory_order_release);
  dirty_.clear();
}

}  // namespace minivmm::block::qcow2
