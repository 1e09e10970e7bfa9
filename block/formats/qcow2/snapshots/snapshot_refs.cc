// SPDX-License-Identifier: Apache-2.0
// What snapshots do to refcounts and COPIED flags.
#include <algorithm>
#include <exception>
#include <vector>

#include "base/buffer.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/snapshots/snapshot_set.h"

namespace minivmm::block::qcow2 {
namespace {

// Clears COPIED in entries; returns whether any had it.
bool clear_flags(std::byte* entries, uint64_t bytes, const Geometry& g) {
  bool changed = false;
  for (uint64_t at = 0; at < bytes; at += g.l2_entry_bytes()) {
    const auto entry = base::load_be<uint64_t>(entries + at);
    if ((entry & kFlagCopied) == 0 || (entry & kFlagCompressed) != 0) continue;
    base::store_be(entries + at, entry & ~kFlagCopied);
    changed = true;
  }
  return changed;
}

}  // namespace

// One more for each reference. After an error they are as before.
void SnapshotSet::raise_tree(const L1Entries& l1) {
  uint64_t raised = 0;
  ClusterRun run;  // references to neighbours go up together
  const auto flush = [&] {
    const ClusterRun now = std::exchange(run, {});
    if (now.count != 0) parts_.refcounts.raise(now.first, now.count, raised);
    if (image_.under_pressure()) image_.commit();
  };
  try {
    walk_tree(image_.file(), l1, [&](HostClusters clusters, bool) {
      if (run.count != 0 && clusters.first == run.first + run.count) {
        run.count += clusters.count;
        return;
      }
      flush();
      run = {clusters.first, clusters.count};
    });
    flush();
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    lower_again(l1, raised);
    std::rethrow_exception(error);
  }
}

// Takes back the first `references` that raise_tree added. None of them goes to 0.
void SnapshotSet::lower_again(const L1Entries& l1, uint64_t references) noexcept {
  try {
    walk_tree(image_.file(), l1, [&](HostClusters clusters, bool) {
      for (uint64_t i = 0; i < clusters.count && references > 0; ++i, --references) {
        parts_.refcounts.lower(clusters.first + i);
      }
    });
    refresh_flags();
    image_.commit();
  } catch (const std::exception& e) {
    base::log_warning("{}: some refcounts stay too high, until `minivmm image check -r leaks`: {}",
                      image_.file().name(), e.what());
  }
}

// Nothing on disk refers to it any more.
void SnapshotSet::release_tree(const L1Entries& l1, base::Epoch& epoch) {
  walk_tree(image_.file(), l1, [&](HostClusters clusters, bool is_table) {
    if (is_table) {
      release_table(clusters);
    } else {
      image_.drop(clusters);
    }
    if (!image_.under_pressure()) return;
    image_.commit();
    image_.reclaim(epoch);
  });
}

void SnapshotSet::release_table(HostClusters clusters) {
  const char* there = parts_.metadata.find(clusters.first, clusters.count);
  if (there != nullptr && there != kL2Table) {
    throw image_.file().corruption(std::string("an L1 entry of a snapshot points to the ") + there);
  }
  parts_.quarantine.add(clusters);
}

void SnapshotSet::clear_active_flags() {
  const Geometry& g = image_.file().geometry();
  MetadataCache& l2 = image_.l2();
  for (uint64_t i = 0; i < parts_.l1.size(); ++i) {
    const uint64_t entry = parts_.l1.get(i);
    if (entry == 0) continue;
    const uint64_t table = entry & kOffsetMask;
    for (uint64_t at = table; at < table + g.cluster_size(); at += l2.slice_size()) {
      l2.change(at, [&](std::byte* slice) { return clear_flags(slice, l2.slice_size(), g); });
    }
    if ((entry & kFlagCopied) != 0) parts_.l1.set(i, entry & ~kFlagCopied);
    if (image_.under_pressure()) image_.commit();
  }
}

// Of tables that the disk may not use: not through the cache, which forgets a table when the disk
// gives it up. Durable on return.
void SnapshotSet::clear_flags_in_file(const L1Entries& l1) {
  const Geometry& g = image_.file().geometry();
  Edge& file = image_.file().file();
  base::Buffer bytes(g.cluster_size());
  for (const uint64_t entry : l1) {
    if (entry == 0) continue;
    file.read(entry & kOffsetMask, bytes.io());
    if (!clear_flags(bytes.data(), bytes.size(), g)) continue;
    file.write(entry & kOffsetMask, bytes.io());
    image_.l2().drop(entry & kOffsetMask, g.cluster_size());
  }
  file.flush();
}

// COPIED in the disk's tables says what the refcounts say.
void SnapshotSet::refresh_flags() {
  const Geometry& g = image_.file().geometry();
  for (uint64_t i = 0; i < parts_.l1.size(); ++i) {
    const uint64_t entry = parts_.l1.get(i);
    if (entry == 0) continue;
    const uint64_t table = entry & kOffsetMask;
    const bool ours = parts_.refcounts.get(table >> g.cluster_bits) == 1;
    // What a shared table refers to is shared: its flags are clear.
    if (ours) refresh_table(i, table);
    const uint64_t wanted = table | (ours ? kFlagCopied : 0);
    if (wanted != entry) parts_.l1.set(i, wanted);
    if (image_.under_pressure()) image_.commit();
    if (i % 64 == 63) base::EventLoop::current()->yield();
  }
}

void SnapshotSet::refresh_table(uint64_t l1_index, uint64_t table) {
  const Geometry& g = image_.file().geometry();
  MetadataCache& l2 = image_.l2();
  const uint64_t entries = l2.slice_size() / g.l2_entry_bytes();
  std::vector<uint64_t> hosts(entries);  // cluster numbers; 0: no host cluster
  std::vector<bool> ours(entries);
  uint64_t guest_offset = l1_index << g.l1_shift();
  for (uint64_t at = table; at < table + g.cluster_size(); at += l2.slice_size()) {
    l2.read(at, [&](const std::byte* slice) {
      for (uint64_t i = 0; i < entries; ++i, guest_offset += g.cluster_size()) {
        const L2Entry entry =
            decode_l2(load_l2(slice + i * g.l2_entry_bytes(), g), g, guest_offset);
        const bool has_host = entry.problem == nullptr && entry.has_host;
        hosts[i] = has_host ? entry.host_offset >> g.cluster_bits : 0;
      }
    });
    // Looked up outside the slice's lock: a refcount block may have to be read.
    for (uint64_t i = 0; i < entries; ++i) {
      ours[i] = hosts[i] != 0 && parts_.refcounts.get(hosts[i]) == 1;
    }
    l2.change(at, [&](std::byte* slice) {
      bool changed = false;
      for (uint64_t i = 0; i < entries; ++i) {
        if (hosts[i] == 0) continue;
        std::byte* place = slice + i * g.l2_entry_bytes();
        const auto raw = base::load_be<uint64_t>(place);
        const uint64_t wanted = (raw & ~kFlagCopied) | (ours[i] ? kFlagCopied : 0);
        if (wanted == raw) continue;
        base::store_be(place, wanted);
        changed = true;
      }
      return changed;
    });
  }
}

}  // namespace minivmm::block::qcow2
