// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/l1_table.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/bytes.h"

namespace minivmm::block::qcow2 {

L1Table::L1Table(ImageFile& image)
    : image_(image),
      size_(image.header().l1_size),
      entries_(std::make_unique<std::atomic<uint64_t>[]>(size_)) {
  constexpr size_t kPiece = 1 << 20;
  const uint64_t bytes = uint64_t{size_} * 8;
  base::Buffer buffer(std::min<uint64_t>(bytes, kPiece));
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t now = std::min<uint64_t>(kPiece, bytes - done);
    image.file().read(image.header().l1_offset + done, base::SingleBuffer(buffer.data(), now));
    for (uint64_t i = 0; i < now; i += 8) {
      entries_[(done + i) / 8].store(base::load_be<uint64_t>(buffer.data() + i),
                                     std::memory_order_relaxed);
    }
    done += now;
  }
}

void L1Table::set(uint64_t index, uint64_t value) {
  const std::lock_guard lock(mutex_);
  entries_[index].store(value, std::memory_order_release);
  dirty_.push_back(static_cast<uint32_t>(index));
}

L1Table::Changes L1Table::take_dirty() {
  Changes out;
  const std::lock_guard lock(mutex_);
  std::sort(dirty_.begin(), dirty_.end());
  dirty_.erase(std::unique(dirty_.begin(), dirty_.end()), dirty_.end());
  for (const uint32_t index : dirty_) {
    out.emplace_back(index, entries_[index].load(std::memory_order_relaxed));
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
    image_.file().write(image_.header().l1_offset + uint64_t{first} * 8,
                        base::SingleBuffer(std::span<const std::byte>(bytes)));
  }
}

void L1Table::failed(const Changes& changes) {
  const std::lock_guard lock(mutex_);
  for (const auto& change : changes) dirty_.push_back(change.first);
}

}  // namespace minivmm::block::qcow2
