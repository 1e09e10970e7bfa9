// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/snapshots/snapshot_set.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <ctime>
#include <exception>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/log.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/listing.h"

namespace minivmm::block::qcow2 {

using base::Error;

namespace {

uint64_t bytes_of(const std::vector<SnapshotEntry>& entries) {
  uint64_t out = 0;
  for (const SnapshotEntry& entry : entries) out += entry.total_bytes();
  return out;
}

}  // namespace

const std::vector<SnapshotEntry>& SnapshotSet::entries() {
  if (!entries_) {
    const Header header = image_.file().header_update().current();
    entries_ = read_snapshots(image_.file().file(), header);
    list_ = {header.snapshots_offset, image_.file().geometry().clusters(bytes_of(*entries_))};
  }
  return *entries_;
}

std::string SnapshotSet::next_id() const {
  uint64_t most = 0;
  for (const SnapshotEntry& entry : *entries_) {
    uint64_t number = 0;
    const char* end = entry.id.data() + entry.id.size();
    const auto [stop, problem] = std::from_chars(entry.id.data(), end, number);
    if (problem == std::errc{} && stop == end && number < UINT32_MAX) {
      most = std::max(most, number);
    }
  }
  return std::to_string(most + 1);
}

// Everything that was changed is on disk, and nothing waits to be freed.
void SnapshotSet::settle(base::Epoch& epoch) {
  do {
    image_.commit();
    image_.reclaim(epoch);
  } while (!image_.quarantine().empty() && !image_.file().broken());
  image_.commit();
  image_.file().require_intact();
}

uint64_t SnapshotSet::l1_entries_for(uint64_t size) const {
  const unsigned shift = image_.file().geometry().l1_shift();
  const uint64_t entries = (size >> shift) + ((size & ((uint64_t{1} << shift) - 1)) != 0 ? 1 : 0);
  if (entries > kMaxL1Bytes / 8) {
    throw Error(EINVAL, fmt::format("{}: a disk of {} bytes is too large for its cluster size",
                                    image_.file().name(), size));
  }
  return std::max<uint64_t>(entries, 1);
}

// As far as there is one: zeroes behind it.
L1Entries SnapshotSet::active_l1(uint64_t entries) const {
  L1Entries out(entries);
  const uint64_t there = std::min<uint64_t>(entries, parts_.l1.size());
  for (uint64_t i = 0; i < there; ++i) out[i] = parts_.l1.get(i) & ~kFlagCopied;
  return out;
}

void SnapshotSet::give_back(uint64_t offset, uint64_t clusters) noexcept {
  // Where writes are refused nobody knows what the header points to.
  if (clusters != 0 && !image_.file().broken()) image_.allocator().give_back(offset, clusters);
}

uint64_t SnapshotSet::write_l1(const L1Entries& entries) {
  const Geometry& g = image_.file().geometry();
  const uint64_t clusters = g.clusters(entries.size() * 8);
  base::Buffer bytes = base::Buffer::zeroed(clusters << g.cluster_bits);
  for (size_t i = 0; i < entries.size(); ++i) base::store_be(bytes.data() + i * 8, entries[i]);
  const uint64_t offset = image_.allocator().allocate_together(clusters);
  try {
    image_.file().file().write(offset, bytes.io());
  } catch (...) {
    give_back(offset, clusters);
    throw;
  }
  return offset;
}

SnapshotSet::List SnapshotSet::write_list(const std::vector<SnapshotEntry>& entries) {
  const Geometry& g = image_.file().geometry();
  const uint64_t length = bytes_of(entries);
  if (length > kMaxListBytes || entries.size() > kMaxSnapshots) {
    throw Error(EFBIG, image_.file().name() + ": there is no room for another snapshot");
  }
  List out{0, g.clusters(length)};
  if (out.clusters == 0) return out;
  base::Buffer bytes = base::Buffer::zeroed(out.clusters << g.cluster_bits);
  std::byte* at = bytes.data();
  for (const SnapshotEntry& entry : entries) {
    const std::vector<std::byte> encoded = encode_snapshot(entry);
    at = std::copy(encoded.begin(), encoded.end(), at);
  }
  out.offset = image_.allocator().allocate_together(out.clusters);
  try {
    image_.file().file().write(out.offset, bytes.io());
  } catch (...) {
    give_back(out.offset, out.clusters);
    throw;
  }
  return out;
}

template <typename Work>
void SnapshotSet::tidy_up(const Work& work) noexcept {
  try {
    work();
  } catch (const std::exception& e) {
    base::log_warning(
        "{}: not all that a snapshot held could be freed; `minivmm image check -r "
        "leaks` will: {}",
        image_.file().name(), e.what());
  }
}

void SnapshotSet::switch_list(const List& list, size_t count) {
  image_.file().change_numbers([&](Header& h) {
    h.snapshots_offset = list.offset;
    h.snapshots = static_cast<uint32_t>(count);
  });
  const unsigned bits = image_.file().geometry().cluster_bits;
  parts_.metadata.move_snapshot_table(list.offset >> bits, list.clusters);
  const List old = std::exchange(list_, list);
  if (old.clusters != 0) image_.drop({old.offset >> bits, old.clusters});
}

std::string SnapshotSet::create(std::string_view name, uint64_t size, base::Epoch& epoch) {
  if (image_.file().geometry().external_data) {
    throw Error(ENOTSUP, image_.file().name() +
                             ": an image with an external data file cannot have snapshots");
  }
  if (name.size() > kMaxSnapshotNameBytes) throw Error(EINVAL, "the snapshot's name is too long");
  std::vector<SnapshotEntry> wanted = entries();
  settle(epoch);
  const Geometry& g = image_.file().geometry();
  SnapshotEntry entry;
  entry.id = next_id();
  entry.name = name;
  entry.id_bytes = static_cast<uint16_t>(entry.id.size());
  entry.name_bytes = static_cast<uint16_t>(entry.name.size());
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  entry.date_seconds = static_cast<uint32_t>(now.tv_sec);
  entry.date_nanoseconds = static_cast<uint32_t>(now.tv_nsec);
  entry.disk_size = size;
  entry.extra = snapshot_extra(0, size);
  entry.extra_bytes = static_cast<uint32_t>(entry.extra.size());
  const L1Entries l1 = active_l1(l1_entries_for(size));
  entry.l1_size = static_cast<uint32_t>(l1.size());
  entry.l1_offset = write_l1(l1);
  const uint64_t l1_clusters = g.clusters(l1.size() * 8);
  wanted.push_back(entry);
  List list;
  std::exception_ptr error;
  bool raised = false;
  try {
    list = write_list(wanted);
    raise_tree(l1);
    raised = true;
    image_.commit();
    clear_active_flags();
    image_.commit();
    switch_list(list, wanted.size());
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    if (raised && !image_.file().broken()) lower_again(l1, ~uint64_t{0});
    give_back(list.offset, list.clusters);
    give_back(entry.l1_offset, l1_clusters);
    std::rethrow_exception(error);
  }
  entries_ = std::move(wanted);
  tidy_up([&] { settle(epoch); });
  return entry.id;
}

void SnapshotSet::remove(std::string_view name, base::Epoch& epoch) {
  std::vector<SnapshotEntry> wanted = entries();
  const auto it = std::find_if(wanted.begin(), wanted.end(),
                               [&](const SnapshotEntry& entry) { return entry.name == name; });
  if (it == wanted.end()) throw Error(ENOENT, "snapshot not found");
  settle(epoch);
  const SnapshotEntry entry = *it;
  wanted.erase(it);
  // What it refers to is freed: all of it has to make sense before anything is changed.
  const L1Entries l1 = read_l1(image_.file(), entry.l1_offset, entry.l1_size);
  walk_tree(image_.file(), l1, [](HostClusters, bool) {});
  const List list = write_list(wanted);
  try {
    image_.commit();
    switch_list(list, wanted.size());
  } catch (...) {
    give_back(list.offset, list.clusters);
    throw;
  }
  entries_ = std::move(wanted);
  const Geometry& g = image_.file().geometry();
  tidy_up([&] {
    release_tree(l1, epoch);
    if (!l1.empty()) image_.drop({entry.l1_offset >> g.cluster_bits, g.clusters(l1.size() * 8)});
    settle(epoch);
    refresh_flags();
    image_.commit();
  });
}

uint64_t SnapshotSet::apply(std::string_view id_or_name, uint64_t size, base::Epoch& epoch) {
  const std::vector<SnapshotEntry>& all = entries();
  auto it = std::find_if(all.begin(), all.end(),
                         [&](const SnapshotEntry& entry) { return entry.id == id_or_name; });
  if (it == all.end()) {
    it = std::find_if(all.begin(), all.end(),
                      [&](const SnapshotEntry& entry) { return entry.name == id_or_name; });
  }
  if (it == all.end()) throw Error(ENOENT, "No such file or directory");
  settle(epoch);
  const Geometry& g = image_.file().geometry();
  const uint64_t new_size = it->disk_size != 0 ? it->disk_size : size;
  if (new_size > kMaxDiskSize || new_size % 512 != 0) {
    throw Error(EINVAL, fmt::format("the snapshot is of a disk of {} bytes", new_size));
  }
  const uint64_t entries = l1_entries_for(new_size);
  L1Entries l1 = read_l1(image_.file(), it->l1_offset, it->l1_size);
  l1.resize(entries);  // without the VM state
  for (uint64_t& entry : l1) entry &= ~kFlagCopied;
  const L1Entries old = active_l1(parts_.l1.size());
  const List old_table{parts_.l1.offset(), g.clusters(old.size() * 8)};
  const uint64_t offset = write_l1(l1);
  std::exception_ptr error;
  bool raised = false;
  try {
    walk_tree(image_.file(), old, [](HostClusters, bool) {});  // it is freed in the end
    raise_tree(l1);
    raised = true;
    image_.commit();
    clear_flags_in_file(l1);
    image_.file().change_numbers([&](Header& h) {
      h.l1_offset = offset;
      h.l1_size = static_cast<uint32_t>(entries);
      h.size = new_size;
    });
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    if (raised && !image_.file().broken()) lower_again(l1, ~uint64_t{0});
    give_back(offset, g.clusters(entries * 8));
    std::rethrow_exception(error);
  }
  parts_.l1.replace(offset, l1);
  parts_.metadata.move_l1_table(offset >> g.cluster_bits, g.clusters(entries * 8));
  for (const uint64_t entry : l1) {
    if (entry == 0) continue;
    image_.l2().drop(entry & kOffsetMask, g.cluster_size());
    parts_.metadata.add((entry & kOffsetMask) >> g.cluster_bits, kL2Table);
  }
  tidy_up([&] {
    release_tree(old, epoch);
    if (old_table.clusters != 0) {
      image_.drop({old_table.offset >> g.cluster_bits, old_table.clusters});
    }
    settle(epoch);
    refresh_flags();
    image_.commit();
  });
  return new_size;
}

}  // namespace minivmm::block::qcow2
