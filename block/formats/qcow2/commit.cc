// SPDX-License-Identifier: Apache-2.0
// The order in which changes reach the disk.
//
// In memory, a request goes: refcount of the new cluster to 1; data written to it; L2 entry set.
// (A new L2 table: refcount to 1; the table written as zeroes, or as a copy of the shared one that
// it replaces; L1 entry set.) Dropping a cluster: L2 entry changed; cluster to the quarantine.
//
// A commit
//  0  takes, in this order: the waiting part of the quarantine; the changed L1 entries; copies of
//     the changed L2 slices; the changed refcount table entries; copies of the changed refcount
//     slices. What points is thus copied before what it points to is counted: a reference that
//     was copied has its refcount in the copies too, and a change made in between is simply part
//     of the next commit. Likewise a cluster taken from the quarantine has the change of its L2
//     entry in these copies or in those of an earlier commit.
//  1  writes the refcount slices. They belong to blocks that were written when they were made; if
//     there are new blocks: flush, then the refcount table's entries for them. (A table entry must
//     not point to a block that a crash may lose: all refcounts behind it would be garbage.)
//  2  flushes (an external data file first of all): data, refcounts and new L2 tables are durable
//  before anything points to them. A
//     crash up to here leaves clusters that are counted and not used: leaks.
//  3  writes the L2 slices and exactly the L1 entries taken. They need no order among themselves:
//     a new L2 table was written when it was made, so an L1 entry that arrives before the slices
//     finds zeroes (the old content), and slices that arrive before it are out of reach.
//  4  flushes. What was promised is durable.
//  5  lets the clusters taken from the quarantine mature: nothing on disk points to them. They are
//     counted down in memory by Image::reclaim and written by a later commit, so again a crash
//     leaves a leak at worst.
//
// With lazy refcounts (the image's dirty bit is set before the first change) step 1 is left out:
// who opens the image after a crash counts all references anew.
//
// Refcounts that go down never travel with the L2 change that caused them, which is what makes one
// order do for both directions.
#include "block/formats/qcow2/commit.h"

#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/iovec.h"

namespace minivmm::block::qcow2 {

struct Committer::Changes {
  Quarantine::Runs freed;
  L1Table::Changes l1;
  std::vector<MetadataCache::Copy> l2;
  Refcounts::TableChanges table;
  std::vector<MetadataCache::Copy> blocks;
};

Committer::Committer(ImageFile& image, Edge* data, const MetadataMap& metadata, L1Table& l1,
                     MetadataCache& l2, MetadataCache& blocks, Refcounts& refcounts,
                     Quarantine& quarantine)
    : image_(image),
      data_(data),
      metadata_(metadata),
      l1_(l1),
      l2_(l2),
      blocks_(blocks),
      refcounts_(refcounts),
      quarantine_(quarantine) {}

void Committer::commit() {
  std::unique_lock lock(mutex_);
  // One that is running may have copied before this caller's changes were made.
  const uint64_t wanted = started_ + 1;
  while (finished_ < wanted) {
    if (running_) {
      waiters_.wait(lock, "a metadata commit");
      continue;
    }
    running_ = true;
    const uint64_t number = ++started_;
    lock.unlock();
    std::exception_ptr error;
    try {
      run();
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    running_ = false;
    finished_ = number;
    last_error_ = error;
    waiters_.notify_all();
  }
  // A later commit than the one wanted covers this caller's changes as well.
  if (last_error_) std::rethrow_exception(last_error_);
}

void Committer::without_commit(const std::function<void()>& work) {
  {
    std::unique_lock lock(mutex_);
    while (running_) waiters_.wait(lock, "a metadata commit");
    running_ = true;
  }
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    running_ = false;
    waiters_.notify_all();
  }
  if (error) std::rethrow_exception(error);
}

uint64_t Committer::commits() const {
  const std::lock_guard lock(mutex_);
  return finished_;
}

void Committer::run() {
  Changes changes;
  take(changes);
  try {
    write(changes);
  } catch (...) {
    finish(changes, false);
    throw;
  }
  finish(changes, true);
}

void Committer::take(Changes& changes) {
  changes.freed = quarantine_.take_waiting();
  changes.l1 = l1_.take_dirty();
  changes.l2 = l2_.take_dirty();
  if (lazy_ && !blocks_.under_pressure()) return;
  changes.table = refcounts_.take_dirty_table();
  changes.blocks = blocks_.take_dirty();
}

// Two tables in one place would overwrite each other, and nothing has noticed so far. (That the
// image is known to be corrupt is no reason not to write the rest: it belongs to requests that were
// answered before.)
void Committer::require_places(const Changes& changes) {
  for (const auto& copy : changes.blocks) {
    require_place(copy.offset, copy.bytes.size(), kRefcountBlock);
  }
  for (const auto& copy : changes.l2) require_place(copy.offset, copy.bytes.size(), kL2Table);
  if (!changes.l1.empty()) require_place(l1_.offset(), uint64_t{l1_.size()} * 8, kL1Table);
}

void Committer::require_place(uint64_t offset, uint64_t bytes, const char* what) {
  const unsigned bits = image_.geometry().cluster_bits;
  const uint64_t first = offset >> bits;
  const uint64_t count = ((offset + bytes - 1) >> bits) - first + 1;
  if (const char* there = metadata_.find(first, count, what)) {
    throw image_.corruption(fmt::format("the {} at {:#x} lies on the {}", what, offset, there));
  }
}

void Committer::write(const Changes& changes) {
  require_places(changes);
  Edge& file = image_.file();
  if (data_ != nullptr) data_->flush();
  write_slices(changes.blocks);
  if (!changes.table.empty()) {
    file.flush();
    refcounts_.write_table(changes.table);
  }
  if (!changes.l2.empty() || !changes.l1.empty()) {
    file.flush();
    write_slices(changes.l2);
    l1_.write(changes.l1);
  }
  file.flush();
}

void Committer::finish(Changes& changes, bool ok) {
  if (ok) {
    l2_.written(changes.l2);
    blocks_.written(changes.blocks);
    quarantine_.mature(std::move(changes.freed));
  } else {
    l1_.failed(changes.l1);
    l2_.failed(changes.l2);
    refcounts_.failed(changes.table);
    blocks_.failed(changes.blocks);
    quarantine_.put_back(changes.freed);
  }
}

// The copies are sorted by offset; neighbours go in one write.
void Committer::write_slices(const std::vector<MetadataCache::Copy>& copies) {
  constexpr size_t kMostBuffers = 512;
  std::vector<iovec> pieces;
  for (size_t i = 0; i < copies.size();) {
    const uint64_t start = copies[i].offset;
    uint64_t end = start;
    pieces.clear();
    while (i < copies.size() && copies[i].offset == end && pieces.size() < kMostBuffers) {
      const base::Buffer& bytes = copies[i].bytes;
      // SAFETY: iovec has no const form; a write only reads it.
      pieces.push_back({const_cast<std::byte*>(bytes.data()), bytes.size()});
      end += bytes.size();
      ++i;
    }
    image_.file().write(start, IoSpan(std::span<const iovec>(pieces)));
  }
}

}  // namespace minivmm::block::qcow2
