// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/compare_job.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"

namespace minivmm::block {

using base::Error;

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kNowhere = ~uint64_t{0};
// Two buffers a worker, and both are read: what fits the CPU's cache is fastest.
constexpr uint64_t kRequest = 512 * 1024;

}  // namespace

CompareJob::Pair::Pair(Side first, Side second, bool strict)
    : sides_{std::move(first), std::move(second)},
      strict_(strict),
      size_(std::max(sides_[0].size, sides_[1].size)),
      chains_{LayerChain(*sides_[0].disk), LayerChain(*sides_[1].disk)} {}

ChainStatus CompareJob::Pair::status(size_t side, uint64_t offset, uint64_t length) {
  Side& s = sides_[side];
  if (offset >= s.size) return {.length = length, .zero = true};
  const uint64_t inside = std::min(length, s.size - offset);
  try {
    // A raw disk whose last sector is short has nothing to say of its rest.
    if (offset >= s.disk->size()) return {.length = inside, .zero = true};
    return chains_[side].status(offset, inside);
  } catch (Error& e) {
    e.prepend(fmt::format("Sector allocation test failed for {} at offset {}", s.name, offset));
    throw;
  }
}

SourceExtent CompareJob::Pair::extent(uint64_t offset, uint64_t length) {
  const ChainStatus first = status(0, offset, length);
  const ChainStatus second = status(1, offset, first.length);
  if (strict_) {
    const bool same = first.data == second.data && first.zero == second.zero &&
                      first.present == second.present &&
                      first.host_offset.has_value() == second.host_offset.has_value();
    if (!same) {
      differs_at_.store(offset);
      // Nothing after it matters.
      return {offset, length, ExtentKind::kZero};
    }
  }
  const bool zero = first.zero && second.zero;
  return {offset, second.length, zero ? ExtentKind::kZero : ExtentKind::kData};
}

void CompareJob::Pair::read_side(size_t side, uint64_t offset, IoSpan to) {
  Side& s = sides_[side];
  const uint64_t inside = offset >= s.size ? 0 : std::min(to.bytes(), s.size - offset);
  try {
    base::IoList list;
    if (inside > 0) s.disk->read(offset, base::slice(to, 0, inside, list));
  } catch (Error& e) {
    e.prepend(fmt::format("Error while reading offset {} of {}", offset, s.name));
    throw;
  }
  base::fill_zero(to, inside, to.bytes() - inside);
}

void CompareJob::Pair::read(uint64_t offset, IoSpan to) { read_side(0, offset, to); }

void CompareJob::Pair::copy_to(Edge&, uint64_t, uint64_t, uint64_t) {
  throw Error(ENOTSUP, "copy range: not of two disks");
}

CompareJob::CompareJob(Side first, Side second, bool strict)
    : pair_(std::move(first), std::move(second), strict), cursor_(pair_, kRequest) {}

std::optional<Difference> CompareJob::run(base::LoopGroup& loops, unsigned requests) {
  const auto all = static_cast<unsigned>(loops.size());
  workers_.run(loops, requests != 0 ? requests : 2 * all, [this] { work(); });
  if (cancelled_.load(std::memory_order_acquire)) {
    throw Error(ECANCELED, "the comparison was stopped");
  }
  const uint64_t content = content_differs_at_.load();
  const uint64_t status = pair_.status_differs_at();
  if (content == kNowhere && status == kNowhere) return std::nullopt;
  if (content < status) return Difference{Difference::Kind::kContent, content};
  return Difference{Difference::Kind::kStatus, status};
}

void CompareJob::work() {
  base::Buffer first(kRequest);
  base::Buffer second(kRequest);
  Batch batch;
  while (!workers_.stopped()) {
    try {
      if (!cursor_.next(batch)) return;
      // What was dealt out earlier still matters: it may hold a lower difference.
      if (batch.offset > content_differs_at_.load(std::memory_order_acquire)) return;
      compare(batch, first, second);
    } catch (...) {
      if (batch.offset < content_differs_at_.load(std::memory_order_acquire)) {
        workers_.failed(batch.offset);
      }
      return;
    }
    done_.fetch_add(batch.length, std::memory_order_relaxed);
  }
}

void CompareJob::compare(const Batch& batch, base::Buffer& first, base::Buffer& second) {
  for (const SourceExtent& extent : batch.extents) {
    if (extent.kind != ExtentKind::kData) continue;
    const std::span<std::byte> a = first.span().first(extent.length);
    const std::span<std::byte> b = second.span().first(extent.length);
    pair_.read_side(0, extent.offset, base::SingleBuffer(a));
    pair_.read_side(1, extent.offset, base::SingleBuffer(b));
    if (std::memcmp(a.data(), b.data(), a.size()) == 0) continue;
    const auto at = std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin();
    const uint64_t byte = extent.offset + static_cast<uint64_t>(at);
    // Sectors are counted from where the shorter side ends, too, as qemu-img does.
    const uint64_t from = byte >= pair_.common() ? pair_.common() : 0;
    differs(from + base::align_down(byte - from, kSector));
    return;
  }
}

void CompareJob::differs(uint64_t offset) noexcept {
  uint64_t known = content_differs_at_.load();
  while (offset < known && !content_differs_at_.compare_exchange_weak(known, offset)) {
  }
}

}  // namespace minivmm::block
