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
#include "block/formats/qcow2/snapshots/tree_switch.h"

namespace minivmm::block::qcow2 {

using base::Error;

namespace {

uint64_t tables_in(const L1Entries& l1) {
  return static_cast<uint64_t>(
      std::count_if(l1.begin(), l1.end(), [](uint64_t entry) { return entry != 0; }));
}

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

// As they are, with their flags.
L1Entries SnapshotSet::active_l1() const {
  L1Entries out(l1_.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = l1_.get(i);
  return out;
}

uint64_t SnapshotSet::clusters_of(const L1Entries& l1) const {
  return image_.file().geometry().clusters(l1.size() * 8);
}

uint64_t SnapshotSet::take_l1(TreeSwitch& change, const L1Entries& l1) const {
  // The table of a disk of 0 bytes has no entries and takes no room.
  return l1.empty() ? l1_.offset() : change.take(clusters_of(l1));
}

SnapshotSet::List SnapshotSet::take_list(TreeSwitch& change,
                                         const std::vector<SnapshotEntry>& entries) {
  const uint64_t length = bytes_of(entries);
  if (length > kMaxListBytes || entries.size() > kMaxSnapshots) {
    throw Error(EFBIG, image_.file().name() + ": there is no room for another snapshot");
  }
  List out{0, image_.file().geometry().clusters(length)};
  if (out.clusters != 0) out.offset = change.take(out.clusters);
  return out;
}

void SnapshotSet::write_list(const List& list, const std::vector<SnapshotEntry>& entries) {
  if (list.clusters == 0) return;
  base::Buffer bytes = base::Buffer::zeroed(list.clusters << image_.file().geometry().cluster_bits);
  std::byte* at = bytes.data();
  for (const SnapshotEntry& entry : entries) {
    const std::vector<std::byte> encoded = encode_snapshot(entry);
    at = std::copy(encoded.begin(), encoded.end(), at);
  }
  image_.file().file().write(list.offset, bytes.io());
}

// The header points to it.
void SnapshotSet::use_list(const List& list, std::vector<SnapshotEntry> entries) {
  const unsigned bits = image_.file().geometry().cluster_bits;
  image_.metadata().move_snapshot_table(list.offset >> bits, list.clusters);
  list_ = list;
  entries_ = std::move(entries);
  for (const SnapshotEntry& entry : *entries_) {
    image_.metadata().add_beside(entry.l1_offset >> bits,
                                 image_.file().geometry().clusters(uint64_t{entry.l1_size} * 8),
                                 kSnapshotL1);
  }
}

void SnapshotSet::use_l1(uint64_t offset, const L1Entries& l1) {
  const unsigned bits = image_.file().geometry().cluster_bits;
  l1_.replace(offset, l1);
  image_.metadata().move_l1_table(offset >> bits, clusters_of(l1));
  for (const uint64_t entry : l1) {
    if (entry != 0) image_.metadata().add((entry & kOffsetMask) >> bits, kL2Table);
  }
}

// After the header's change: what goes wrong keeps space from being used for a while.
void SnapshotSet::free(TreeSwitch& change, const L1Entries& lowered_tree) noexcept {
  try {
    change.free(lowered_tree);
  } catch (const std::exception& e) {
    base::log_warning("{}: not all that is free now has been given back to the file system: {}",
                      image_.file().name(), e.what());
  }
}

SnapshotEntry SnapshotSet::new_entry(std::string_view name, uint64_t size) const {
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
  return entry;
}

std::string SnapshotSet::create(std::string_view name, uint64_t size, base::Epoch& epoch) {
  if (image_.file().geometry().external_data) {
    throw Error(ENOTSUP, image_.file().name() +
                             ": an image with an external data file cannot have snapshots");
  }
  if (name.size() > kMaxSnapshotNameBytes) throw Error(EINVAL, "the snapshot's name is too long");
  std::vector<SnapshotEntry> wanted = entries();
  settle(epoch);
  L1Entries active = active_l1();
  L1Entries theirs = active;
  theirs.resize(l1_entries_for(size));  // what lies behind the disk's end is not the snapshot's
  for (uint64_t& entry : theirs) entry &= ~kFlagCopied;
  wanted.push_back(new_entry(name, size));
  SnapshotEntry& entry = wanted.back();
  entry.l1_size = static_cast<uint32_t>(theirs.size());

  TreeSwitch change(image_);
  entry.l1_offset = take_l1(change, theirs);
  const List list = take_list(change, wanted);
  const uint64_t l1_offset = take_l1(change, active);
  change.take_l2_tables(tables_in(theirs));
  change.copy_refcounts();
  change.raise_data(theirs);
  for (size_t i = 0; i < std::min(active.size(), theirs.size()); ++i) {
    if (active[i] != 0) active[i] = change.copy_shared_table(active[i]);
  }
  change.write_table(entry.l1_offset, theirs);
  change.write_table(l1_offset, active);
  write_list(list, wanted);
  change.lower(l1_.offset(), clusters_of(active));
  change.lower(list_.offset, list_.clusters);
  change.finish([&](Header& h) {
    h.l1_offset = l1_offset;
    h.snapshots_offset = list.offset;
    h.snapshots = static_cast<uint32_t>(wanted.size());
  });
  std::string id = entry.id;
  use_l1(l1_offset, active);
  use_list(list, std::move(wanted));
  free(change, {});
  return id;
}

void SnapshotSet::remove(std::string_view name, std::string_view id, base::Epoch& epoch) {
  std::vector<SnapshotEntry> wanted = entries();
  const auto it = std::find_if(wanted.begin(), wanted.end(), [&](const SnapshotEntry& entry) {
    return (name.empty() || entry.name == name) && (id.empty() || entry.id == id);
  });
  if (it == wanted.end()) throw Error(ENOENT, "snapshot not found");
  settle(epoch);
  const SnapshotEntry entry = *it;
  wanted.erase(it);
  const L1Entries theirs = read_l1(image_.file(), entry.l1_offset, entry.l1_size);
  L1Entries active = active_l1();

  TreeSwitch change(image_);
  const List list = take_list(change, wanted);
  const uint64_t l1_offset = take_l1(change, active);
  change.take_l2_tables(tables_in(active));
  change.copy_refcounts();
  change.lower_tree(theirs);
  change.lower(entry.l1_offset, clusters_of(theirs));
  change.lower(l1_.offset(), clusters_of(active));
  change.lower(list_.offset, list_.clusters);
  for (size_t i = 0; i < active.size(); ++i) {
    if (active[i] != 0) active[i] = change.refresh_table(i, active[i]);
  }
  change.write_table(l1_offset, active);
  write_list(list, wanted);
  change.finish([&](Header& h) {
    h.l1_offset = l1_offset;
    h.snapshots_offset = list.offset;
    h.snapshots = static_cast<uint32_t>(wanted.size());
  });
  use_l1(l1_offset, active);
  use_list(list, std::move(wanted));
  free(change, theirs);
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
  const uint64_t new_size = it->disk_size != 0 ? it->disk_size : size;
  if (new_size > kMaxDiskSize || new_size % 512 != 0) {
    throw Error(EINVAL, fmt::format("the snapshot is of a disk of {} bytes", new_size));
  }
  L1Entries l1 = read_l1(image_.file(), it->l1_offset, it->l1_size);
  l1.resize(l1_entries_for(new_size));  // without the VM state
  const L1Entries old = active_l1();

  TreeSwitch change(image_);
  const uint64_t l1_offset = take_l1(change, l1);
  change.take_l2_tables(tables_in(l1));
  change.copy_refcounts();
  change.raise_data(l1);
  for (uint64_t& entry : l1) {
    if (entry != 0) entry = change.copy_shared_table(entry);
  }
  change.lower_tree(old);
  change.lower(l1_.offset(), clusters_of(old));
  change.write_table(l1_offset, l1);
  change.finish([&](Header& h) {
    h.l1_offset = l1_offset;
    h.l1_size = static_cast<uint32_t>(l1.size());
    h.size = new_size;
  });
  use_l1(l1_offset, l1);
  free(change, old);
  return new_size;
}

}  // namespace minivmm::block::qcow2
