// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/copy_source.h"

#include <algorithm>
#include <cerrno>

#include "base/error.h"

namespace minivmm::block {

SourceExtent DiskSource::extent(uint64_t offset, uint64_t length) {
  const BlockStatus status = disk_.block_status(offset, length);
  ExtentKind kind = status.zero ? ExtentKind::kZero : ExtentKind::kData;
  if (status.depth >= depth_) kind = ExtentKind::kBelow;
  return {offset, status.length, kind};
}

ConcatSource::ConcatSource(std::vector<CopySource*> parts) : parts_(std::move(parts)) {
  uint64_t end = 0;
  for (const CopySource* part : parts_) ends_.push_back(end += part->size());
}

size_t ConcatSource::part_at(uint64_t offset) const noexcept {
  return static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), offset) - ends_.begin());
}

void ConcatSource::read(uint64_t offset, IoSpan to) {
  for (uint64_t done = 0; done < to.bytes();) {
    const size_t part = part_at(offset + done);
    const uint64_t now = std::min(to.bytes() - done, ends_[part] - (offset + done));
    base::IoList list;
    parts_[part]->read(offset + done - begin_of(part), base::slice(to, done, now, list));
    done += now;
  }
}

SourceExtent ConcatSource::extent(uint64_t offset, uint64_t length) {
  const size_t part = part_at(offset);
  const uint64_t inside = std::min(length, ends_[part] - offset);
  SourceExtent out = parts_[part]->extent(offset - begin_of(part), inside);
  out.offset = offset;
  return out;
}

void ConcatSource::copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) {
  for (uint64_t done = 0; done < length;) {
    const size_t part = part_at(offset + done);
    const uint64_t now = std::min(length - done, ends_[part] - (offset + done));
    parts_[part]->copy_to(target, target_offset + done, offset + done - begin_of(part), now);
    done += now;
  }
}

LayersSource::Found LayersSource::find(uint64_t offset, uint64_t length) {
  Found out;
  for (Edge* layer : layers_) {
    if (offset >= layer->size()) {
      // A layer that is too short reads as zeroes there, whatever lies below it.
      out.extent = {offset, length, ExtentKind::kZero};
      out.layer = layer;
      return out;
    }
    const BlockStatus status =
        layer->block_status(offset, std::min(length, layer->size() - offset));
    length = status.length;
    if (!status.allocated) continue;
    out.extent = {offset, length, status.zero ? ExtentKind::kZero : ExtentKind::kData};
    out.layer = layer;
    return out;
  }
  out.extent = {offset, length, ExtentKind::kBelow};
  return out;
}

SourceExtent LayersSource::extent(uint64_t offset, uint64_t length) {
  return find(offset, length).extent;
}

void LayersSource::read(uint64_t offset, IoSpan to) {
  for (uint64_t done = 0; done < to.bytes();) {
    const Found found = find(offset + done, to.bytes() - done);
    const uint64_t now = found.extent.length;
    if (found.layer == nullptr) throw base::Error(EINVAL, "reading below the layers of a copy");
    base::IoList list;
    const IoSpan part = base::slice(to, done, now, list);
    if (found.extent.kind == ExtentKind::kZero) {
      base::fill_zero(part, 0, now);
    } else {
      found.layer->read(offset + done, part);
    }
    done += now;
  }
}

void LayersSource::copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) {
  const Found found = find(offset, length);
  if (found.layer == nullptr || found.extent.length != length) {
    throw base::Error(ENOTSUP, "copy range: not of one layer");
  }
  target.copy_range(target_offset, length, *found.layer, offset);
}

}  // namespace minivmm::block
