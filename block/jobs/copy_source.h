// SPDX-License-Identifier: Apache-2.0
// What a copy reads: one disk, several as if they followed each other, or what the layers of a
// backing chain hold above one of them. Owned by the caller of the job. All methods run on a fiber
// of any loop, many at once.
#pragma once

#include <string>

#include <cstdint>
#include <vector>

#include "block/graph/edge.h"

namespace minivmm::block {

enum class ExtentKind : uint8_t {
  kData,   // to be read
  kZero,   // reads as zeroes
  kBelow,  // is not this source's: what the target shows already (its backing file's)
};

struct SourceExtent {
  uint64_t offset = 0;
  uint64_t length = 0;
  ExtentKind kind = ExtentKind::kData;
};

class CopySource {
 public:
  virtual ~CopySource() = default;

  virtual uint64_t size() const noexcept = 0;
  virtual void read(uint64_t offset, IoSpan to) = 0;
  // Of a prefix of the range, at least one byte. The range is inside the source, and not empty.
  virtual SourceExtent extent(uint64_t offset, uint64_t length) = 0;
  // Without the data passing through this process. Throws ENOTSUP where that is not possible.
  virtual void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) = 0;
};

// A disk, as its users see it. With `depth`, only what its `depth` uppermost layers hold is its
// own; the rest is kBelow.
class DiskSource final : public CopySource {
 public:
  static constexpr uint32_t kWholeChain = ~uint32_t{0};
  // Past the end of the disk up to `size` it reads as zeroes.
  DiskSource(Edge& disk, uint64_t size, uint32_t depth = kWholeChain) noexcept
      : disk_(disk), size_(size), depth_(depth) {}

  uint64_t size() const noexcept override { return size_; }
  void read(uint64_t offset, IoSpan to) override { disk_.read(offset, to); }
  SourceExtent extent(uint64_t offset, uint64_t length) override;
  void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) override {
    target.copy_range(target_offset, length, disk_, offset);
  }

 private:
  Edge& disk_;
  const uint64_t size_;
  const uint32_t depth_;
};

// One after the other.
class ConcatSource final : public CopySource {
 public:
  explicit ConcatSource(std::vector<CopySource*> parts);

  uint64_t size() const noexcept override { return ends_.empty() ? 0 : ends_.back(); }
  void read(uint64_t offset, IoSpan to) override;
  SourceExtent extent(uint64_t offset, uint64_t length) override;
  void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) override;

 private:
  // The part that holds `offset`, and where it begins.
  size_t part_at(uint64_t offset) const noexcept;
  uint64_t begin_of(size_t part) const noexcept { return part == 0 ? 0 : ends_[part - 1]; }

  std::vector<CopySource*> parts_;
  std::vector<uint64_t> ends_;
};

// Layers of a backing chain, each opened without its backing file, the uppermost first: what they
// hold themselves. Where none holds anything it is kBelow, and must not be read.
class LayersSource final : public CopySource {
 public:
  explicit LayersSource(std::vector<Edge*> layers) noexcept : layers_(std::move(layers)) {}

  uint64_t size() const noexcept override { return layers_.front()->size(); }
  void read(uint64_t offset, IoSpan to) override;
  SourceExtent extent(uint64_t offset, uint64_t length) override;
  void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) override;

 private:
  struct Found {
    SourceExtent extent;
    Edge* layer = nullptr;  // that holds it
  };
  Found find(uint64_t offset, uint64_t length);

  std::vector<Edge*> layers_;
};

}  // namespace minivmm::block
