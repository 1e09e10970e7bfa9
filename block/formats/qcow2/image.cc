// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/image.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <exception>
#include <utility>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/log.h"
#include "block/formats/qcow2/listing.h"

namespace minivmm::block::qcow2 {
namespace {

constexpr uint64_t kDefaultL2Cache = 32ULL << 20;
constexpr uint64_t kMinRefcountCache = 256ULL << 10;
constexpr uint64_t kDefaultSlice = 4096;
// This much may wait for a commit before writers do one: enough to make it worth its flushes,
// little enough that an image which is discarded and rewritten for ever does not grow by much.
constexpr uint64_t kMaxQuarantineBytes = 64ULL << 20;
constexpr uint64_t kMaxQuarantineClusters = 4096;

// What the L2 tables of the whole disk take.
uint64_t all_l2_bytes(const Header& h) {
  const Geometry g = h.geometry();
  const uint64_t tables = g.l1_shift() >= 64 ? 1 : (h.size >> g.l1_shift()) + 1;
  return tables << g.cluster_bits;
}

}  // namespace

CacheSizes choose_cache_sizes(const Header& h, std::optional<uint64_t> total,
                              std::optional<uint64_t> l2, std::optional<uint64_t> refcount,
                              std::optional<uint64_t> l2_entry) {
  const uint64_t cluster = h.geometry().cluster_size();
  const uint64_t slice = l2_entry.value_or(std::min(kDefaultSlice, cluster));
  if (!std::has_single_bit(slice) || slice < 512 || slice > cluster) {
    throw base::Error(EINVAL, fmt::format("l2-cache-entry-size {} is not a power of two from 512 "
                                          "to the cluster size ({})",
                                          slice, cluster));
  }
  if (total && l2 && refcount) {
    throw base::Error(EINVAL,
                      "of cache-size, l2-cache-size and refcount-cache-size at most two "
                      "may be given");
  }
  if (total && (l2.value_or(0) > *total || refcount.value_or(0) > *total)) {
    throw base::Error(EINVAL, "l2-cache-size and refcount-cache-size may not exceed cache-size");
  }
  const uint64_t min_refcount = std::max(kMinRefcountCache, 4 * cluster);
  CacheSizes out;
  out.l2_entry = static_cast<uint32_t>(slice);
  if (total) {
    out.refcount = refcount.value_or(l2 ? *total - *l2 : std::min(min_refcount, *total / 2));
    out.l2 = l2.value_or(*total - out.refcount);
  } else {
    out.l2 = l2.value_or(std::min(kDefaultL2Cache, all_l2_bytes(h)));
    out.refcount = refcount.value_or(min_refcount);
  }
  return out;
}

Image::Image(std::unique_ptr<Edge> file, std::unique_ptr<Edge> data,
             std::unique_ptr<Encryption> encryption, Header header, bool writable, std::string name,
             const CacheSizes& sizes)
    : file_(std::move(file), std::move(header), writable, std::move(name)),
      data_(std::move(data)),
      encryption_(std::move(encryption)),
      metadata_(file_.header()),
      l2_(file_, "the L2 table", sizes.l2_entry, sizes.l2),
      blocks_(file_, "the refcount block",
              static_cast<uint32_t>(std::min(kDefaultSlice, file_.geometry().cluster_size())),
              sizes.refcount),
      l1_(file_),
      refcounts_(file_, blocks_, metadata_),
      allocator_(file_, refcounts_, metadata_),
      bytes_(file_, allocator_, refcounts_),
      map_(file_, l1_, l2_, allocator_, metadata_, quarantine_),
      committer_(file_, data_.get(), metadata_, l1_, l2_, blocks_, refcounts_, quarantine_),
      bitmaps_(*this, allocator_),
      snapshots_(*this, l1_),
      lazy_refcounts_((file_.header().compatible & kCompatLazyRefcounts) != 0) {}

void Image::prepare_first_write() {
  const std::lock_guard lock(preparing_);
  if (ready_to_write_.load(std::memory_order_relaxed)) return;
  file_.require_intact();
  // An attempt that failed later leaves the table loaded, and its blocks are known.
  if (!refcounts_loaded_) refcounts_.load_table();
  refcounts_loaded_ = true;
  know_snapshots();
  const Geometry& g = file_.geometry();
  for (uint32_t i = 0; i < l1_.size(); ++i) {
    const uint64_t entry = l1_.get(i);
    // Invalid entries are reported by whoever follows them.
    if (entry == 0 || l1_problem(entry, g) != nullptr) continue;
    // Also past the file's end: the file could grow to it, and data would become its entries.
    metadata_.add((entry & kOffsetMask) >> g.cluster_bits, kL2Table);
  }
  bitmaps_.before_first_write();
  file_.clear_autoclear(bitmaps_.maintained() ? kAutoclearBitmaps : 0);
  if (lazy_refcounts_) {
    file_.set_dirty(true);
    committer_.set_lazy_refcounts(true);
  }
  ready_to_write_.store(true, std::memory_order_release);
}

void Image::read_data(Encryption::Place place, IoSpan to) {
  if (encryption_) {
    encryption_->read(data(), place, to);
  } else {
    data().read(place.host, to);
  }
}

void Image::write_data(Encryption::Place place, IoSpan from) {
  if (encryption_) {
    encryption_->write(data(), place, from);
  } else {
    data().write(place.host, from);
  }
}

void Image::write_new_data(Encryption::Place place, IoSpan from) {
  write_data(place, from);
  const WriteBehind::Range range = write_behind_.add(place.host, from.bytes());
  if (range.length != 0) data().start_writeback(range.offset, range.length);
}

// The snapshot table, and the tables that it names. What makes no sense is the business of those
// who read it; what can be known of it is kept from harm.
void Image::know_snapshots() {
  const Header h = file_.header_update().current();
  if (h.snapshots == 0) return;
  const Geometry& g = file_.geometry();
  uint64_t bytes = 0;
  try {
    for (const SnapshotEntry& snapshot : read_snapshots(file_.file(), h)) {
      bytes += snapshot.total_bytes();
      const uint64_t table = uint64_t{snapshot.l1_size} * 8;
      if (table > kMaxL1Bytes || !base::range_fits(snapshot.l1_offset, table, file_.size()))
        continue;
      metadata_.add_beside(snapshot.l1_offset >> g.cluster_bits, g.clusters(table), kSnapshotL1);
    }
  } catch (const base::Error& e) {
    base::log_warning("{}: {}", file_.name(), e.what());
  }
  const uint64_t least = uint64_t{h.snapshots} * kSnapshotFixedBytes;
  metadata_.move_snapshot_table(h.snapshots_offset >> g.cluster_bits,
                                g.clusters(std::max(bytes, least)));
}

Allocator::Run Image::allocate_data(uint64_t guest_cluster, uint64_t max) {
  if (data_) return {guest_cluster << file_.geometry().cluster_bits, max, false};
  return allocator_.allocate(max);
}

void Image::give_back_data(const Allocator::Run& run) noexcept {
  if (!data_) allocator_.give_back(run.offset, run.clusters);
}

void Image::require_data(uint64_t host_offset, uint64_t length) {
  if (data_) return;
  const Geometry& g = file_.geometry();
  const uint64_t first = host_offset >> g.cluster_bits;
  const uint64_t last = (host_offset + length - 1) >> g.cluster_bits;
  if (const char* what = metadata_.find(first, last - first + 1)) {
    throw file_.corruption(
        fmt::format("guest data at {:#x} (or in the {} bytes after it) lies in "
                    "the {}",
                    host_offset, length, what));
  }
}

void Image::finish(base::Epoch& epoch) {
  try {
    if (!file_.broken()) bytes_.close();
  } catch (const base::Error& e) {
    base::log_warning("{}: a cluster has leaked: {}", file_.name(), e.what());
  }
  committer_.set_lazy_refcounts(false);
  // A reclaim lowers refcounts, which the next commit writes: in the end nothing has leaked.
  do {
    commit();
    reclaim(epoch);
  } while (!quarantine_.empty());
  commit();
  const bool changed = ready_to_write_.load(std::memory_order_acquire);
  if (lazy_refcounts_ && changed && !file_.broken()) file_.set_dirty(false);
}

void Image::drop(HostClusters clusters) {
  if (clusters.count == 0) return;
  // Freeing metadata because a damaged entry points to it would punch a hole into it. The caller
  // has done its work; the image is not written to any more.
  if (const char* what = metadata_.find(clusters.first, clusters.count)) {
    (void)file_.corruption(fmt::format("an L2 entry pointed to the {}, in {} clusters at {:#x}",
                                       what, clusters.count,
                                       clusters.first << file_.geometry().cluster_bits));
    return;
  }
  quarantine_.add(clusters);
}

bool Image::is_much(uint64_t clusters) const noexcept {
  return clusters > kMaxQuarantineClusters ||
         clusters << file_.geometry().cluster_bits > kMaxQuarantineBytes;
}

bool Image::under_pressure() const noexcept {
  return l2_.under_pressure() || blocks_.under_pressure() || is_much(quarantine_.waiting());
}

void Image::reclaim(base::Epoch& epoch) {
  const std::lock_guard one_at_a_time(reclaiming_);
  for (;;) {
    Quarantine::Runs runs = quarantine_.take_matured();
    if (runs.empty()) return;
    // Freeing goes by what the metadata says. Once that is known to be wrong, these are leaks.
    if (file_.broken()) continue;
    epoch.synchronize();
    std::sort(runs.begin(), runs.end(),
              [](const ClusterRun& a, const ClusterRun& b) { return a.first < b.first; });
    release(runs);
  }
}

// Each run stands for one reference of each of its clusters; compressed clusters share host
// clusters, so runs may overlap. What an error kept from being looked at goes back to the
// quarantine: the next commit brings it here again.
void Image::release(const Quarantine::Runs& runs) {
  ClusterRun free;  // is being put together
  size_t run = 0;
  uint64_t done = 0;  // clusters of that run
  std::exception_ptr error;
  try {
    for (; run < runs.size(); ++run, done = 0) {
      for (; done < runs[run].count; ++done) release_one(runs[run].first + done, free);
    }
    free_unused(std::exchange(free, {}));
    return;
  } catch (...) {
    error = std::current_exception();
  }
  if (!file_.broken()) {
    Quarantine::Runs left;
    if (free.count != 0) left.push_back(free);
    if (run < runs.size()) left.push_back({runs[run].first + done, runs[run].count - done});
    if (run + 1 < runs.size()) {
      left.insert(left.end(), runs.begin() + static_cast<long>(run) + 1, runs.end());
    }
    quarantine_.mature(std::move(left));
  }
  std::rethrow_exception(error);
}

void Image::release_one(uint64_t cluster, ClusterRun& free) {
  if (cluster - free.first < free.count) {
    throw file_.corruption(fmt::format("cluster {:#x} is used twice and has refcount 1",
                                       cluster << file_.geometry().cluster_bits));
  }
  if (refcounts_.get(cluster) != 1) {
    refcounts_.lower(cluster);
    return;
  }
  if (cluster != free.first + free.count) {
    free_unused(std::exchange(free, {}));
    free.first = cluster;
  }
  ++free.count;
}

void Image::free_unused(ClusterRun run) {
  const auto [first, count] = run;
  if (count == 0) return;
  const unsigned bits = file_.geometry().cluster_bits;
  // The hole is punched before the clusters can be given out again: a punch that comes late would
  // take new data with it.
  try {
    file_.file().discard(first << bits, count << bits);
  } catch (const base::Error& e) {
    base::log_debug("{}: {} free clusters at {:#x} keep their space: {}", file_.name(), count,
                    first << bits, e.what());
  }
  for (uint64_t i = 0; i < count; ++i) {
    if (!metadata_.remove(first + i)) continue;
    // A commit that is writing slices of this table must not do so once somebody else has it.
    const uint64_t table = (first + i) << bits;
    committer_.without_commit([&] { l2_.drop(table, file_.geometry().cluster_size()); });
  }
  refcounts_.free_run(first, count);
  allocator_.add_free(first, count);
}

}  // namespace minivmm::block::qcow2
