// SPDX-License-Identifier: Apache-2.0
// A virtio-blk device behind a virtio-mmio window (version 2), driven by the probe.
#pragma once

#include <cstdint>

#include "string_view.h"
#include "text.h"
#include "virtio_queue.h"

namespace minivmm::probe {

struct DiskConfig {
  uint64_t capacity;  // sectors
  uint32_t size_max, seg_max, blk_size;
  uint8_t physical_exponent, alignment_offset;
  uint16_t min_io;
  uint32_t opt_io;
  uint8_t wce;
  uint16_t num_queues;
  uint32_t max_discard_sectors, max_discard_seg, discard_alignment;
  uint32_t max_zeroes_sectors, max_zeroes_seg;
  uint8_t zeroes_may_unmap;
};

enum Feature : unsigned {
  kFeatureSizeMax = 1,
  kFeatureSegMax = 2,
  kFeatureRo = 5,
  kFeatureBlkSize = 6,
  kFeatureFlush = 9,
  kFeatureTopology = 10,
  kFeatureConfigWce = 11,
  kFeatureMq = 12,
  kFeatureDiscard = 13,
  kFeatureWriteZeroes = 14,
  kFeatureIndirect = 28,
  kFeatureEventIdx = 29,
  kFeatureVersion1 = 32,
};
// Bit of a feature name ("event_idx"), or -1.
int feature_bit(StringView name);

struct IoOptions {
  QueueOptions queue;
  bool poll = false;
  int only_queue = -1;  // -1: all in turn
};

class Disk {
 public:
  static constexpr unsigned kMaxQueues = 4;
  static constexpr uint64_t kTimeoutNs = 30ull * 1000 * 1000 * 1000;

  // What happened at the window: an error text, or "" with present() telling whether a block device
  // is there. `refused` are feature bits not to take.
  StringView attach(uint64_t base, unsigned gsi, unsigned slot, uint64_t refused);
  bool present() const { return base_ != 0; }
  // Resets the device and sets it up again; anything in flight is forgotten.
  StringView restart();

  const DiskConfig& config() const { return config_; }
  void read_config();
  bool has(Feature feature) const { return ((features_ >> feature) & 1) != 0; }
  uint64_t bytes() const { return config_.capacity * 512; }
  uint32_t block_size() const { return has(kFeatureBlkSize) ? config_.blk_size : 512; }
  // Bytes of the largest request that fits with these options.
  uint64_t request_max() const;
  unsigned queues() const { return queue_count_; }
  unsigned slot() const { return slot_; }
  // For what no driver does: the registers, a queue's memory, and telling the device of it.
  uint64_t window() const { return base_; }
  Queue& queue(unsigned index) { return queue_[index]; }
  void notify(unsigned index);
  void describe(Line& line) const;
  void set_write_cache(bool on);

  void begin(const IoOptions& options);
  // Adds; false while the queue is full. The device is not told before kick().
  bool add(Request& request);
  void kick();
  // A completed request, or nullptr.
  Request* take();
  // Waits until something has completed. False (with error() set) after kTimeoutNs or if the device
  // asks for a reset.
  bool wait();
  // Waits for everything in flight.
  bool drain();
  uint32_t in_flight() const;
  // One request, start to end. False with error() set if it could not be done at all.
  bool run(Request& request);

  StringView error() const { return error_; }
  uint64_t kicks() const;

 private:
  volatile uint32_t& reg(uint64_t offset) const;
  uint64_t read_features();
  bool write_features();
  bool start_queue(unsigned index);
  uint32_t config32(uint64_t offset) const;
  bool has_completed() const;
  void sleep();

  uint64_t base_ = 0;
  unsigned gsi_ = 0;
  unsigned slot_ = 0;
  uint64_t refused_ = 0;
  uint64_t offered_ = 0;
  uint64_t features_ = 0;
  DiskConfig config_{};
  Queue queue_[kMaxQueues];
  unsigned queue_count_ = 0;
  unsigned next_queue_ = 0;
  IoOptions options_;
  StringView error_;
};

}  // namespace minivmm::probe
