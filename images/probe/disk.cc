// SPDX-License-Identifier: Apache-2.0
#include "disk.h"

#include "arch.h"
#include "clock.h"

namespace minivmm::probe {
namespace {

enum Register : uint64_t {
  kMagic = 0x000,
  kVersion = 0x004,
  kDeviceId = 0x008,
  kDeviceFeatures = 0x010,
  kDeviceFeaturesSel = 0x014,
  kDriverFeatures = 0x020,
  kDriverFeaturesSel = 0x024,
  kQueueSel = 0x030,
  kQueueNumMax = 0x034,
  kQueueNum = 0x038,
  kQueueReady = 0x044,
  kQueueNotify = 0x050,
  kStatus = 0x070,
  kQueueDesc = 0x080,
  kQueueDriver = 0x090,
  kQueueDevice = 0x0a0,
  kConfigGeneration = 0x0fc,
  kConfig = 0x100,
};

constexpr uint32_t kMagicValue = 0x74726976;
constexpr uint32_t kBlockDevice = 2;
constexpr uint32_t kAcknowledge = 1;
constexpr uint32_t kDriver = 2;
constexpr uint32_t kDriverOk = 4;
constexpr uint32_t kFeaturesOk = 8;
constexpr uint32_t kNeedsReset = 64;
constexpr uint32_t kFailed = 128;
constexpr uint64_t kWceOffset = 32;

struct FeatureName {
  Feature bit;
  StringView name;
};
constexpr FeatureName kFeatures[] = {
    {kFeatureSizeMax, "size_max"},
    {kFeatureSegMax, "seg_max"},
    {kFeatureRo, "ro"},
    {kFeatureBlkSize, "blk_size"},
    {kFeatureFlush, "flush"},
    {kFeatureTopology, "topology"},
    {kFeatureConfigWce, "config_wce"},
    {kFeatureMq, "mq"},
    {kFeatureDiscard, "discard"},
    {kFeatureWriteZeroes, "write_zeroes"},
    {kFeatureIndirect, "indirect"},
    {kFeatureEventIdx, "event_idx"},
    {kFeatureVersion1, "version_1"},
};

uint64_t supported_features() {
  uint64_t bits = 0;
  for (const auto& feature : kFeatures) bits |= uint64_t{1} << feature.bit;
  return bits;
}

}  // namespace

int feature_bit(StringView name) {
  for (const auto& feature : kFeatures) {
    if (feature.name == name) return static_cast<int>(feature.bit);
  }
  return -1;
}

volatile uint32_t& Disk::reg(uint64_t offset) const {
  return *reinterpret_cast<volatile uint32_t*>(base_ + offset);
}

uint32_t Disk::config32(uint64_t offset) const { return reg(kConfig + offset); }

StringView Disk::attach(uint64_t base, unsigned gsi, unsigned slot, uint64_t refused) {
  base_ = base;
  gsi_ = gsi;
  slot_ = slot;
  refused_ = refused;
  StringView problem;
  uint32_t device = 0;
  if (reg(kMagic) != kMagicValue) {
    problem = "no virtio magic in the window";
  } else if (reg(kVersion) != 2) {
    problem = "legacy virtio-mmio (version 1); QEMU needs -global virtio-mmio.force-legacy=false";
  } else {
    device = reg(kDeviceId);
  }
  if (device != kBlockDevice) {
    base_ = 0;
    return problem;
  }
  if (!route_device_irq(slot, base, gsi)) return "interrupt line without a controller";
  return restart();
}

uint64_t Disk::read_features() {
  reg(kDeviceFeaturesSel) = 1;
  const uint64_t high = reg(kDeviceFeatures);
  reg(kDeviceFeaturesSel) = 0;
  return (high << 32) | reg(kDeviceFeatures);
}

bool Disk::write_features() {
  reg(kDriverFeaturesSel) = 1;
  reg(kDriverFeatures) = static_cast<uint32_t>(features_ >> 32);
  reg(kDriverFeaturesSel) = 0;
  reg(kDriverFeatures) = static_cast<uint32_t>(features_);
  reg(kStatus) = kAcknowledge | kDriver | kFeaturesOk;
  return (reg(kStatus) & kFeaturesOk) != 0;
}

StringView Disk::restart() {
  reg(kStatus) = 0;
  for (int i = 0; i < 1000000 && reg(kStatus) != 0; ++i) pause();
  if (reg(kStatus) != 0) return error_ = "device does not reset";
  reg(kStatus) = kAcknowledge;
  reg(kStatus) = kAcknowledge | kDriver;
  offered_ = read_features();
  features_ = offered_ & supported_features() & ~refused_;
  if (!has(kFeatureVersion1)) return error_ = "device does not offer VERSION_1";
  if (!write_features()) return error_ = "device refuses the features";
  read_config();
  queue_count_ = has(kFeatureMq) ? config_.num_queues : 1;
  if (queue_count_ == 0) return error_ = "device has no queues";
  if (queue_count_ > kMaxQueues) queue_count_ = kMaxQueues;
  for (unsigned i = 0; i < queue_count_; ++i) {
    if (!start_queue(i)) return error_;
  }
  reg(kStatus) = kAcknowledge | kDriver | kFeaturesOk | kDriverOk;
  if ((reg(kStatus) & (kNeedsReset | kFailed)) != 0) return error_ = "device did not start";
  return {};
}

bool Disk::start_queue(unsigned index) {
  reg(kQueueSel) = index;
  if (reg(kQueueReady) != 0) {
    error_ = "queue is ready after a reset";
    return false;
  }
  uint32_t size = reg(kQueueNumMax);
  if (size == 0) {
    error_ = "queue missing";
    return false;
  }
  if (size > kMaxQueueSize) size = kMaxQueueSize;
  Queue& queue = queue_[index];
  if (!queue.start(static_cast<uint16_t>(index), static_cast<uint16_t>(size), has(kFeatureEventIdx),
                   &reg(kQueueNotify))) {
    error_ = "no memory for the queue";
    return false;
  }
  reg(kQueueNum) = size;
  const auto write_address = [this](uint64_t offset, uint64_t address) {
    reg(offset) = static_cast<uint32_t>(address);
    reg(offset + 4) = static_cast<uint32_t>(address >> 32);
  };
  write_address(kQueueDesc, queue.descriptor_address());
  write_address(kQueueDriver, queue.available_address());
  write_address(kQueueDevice, queue.used_address());
  reg(kQueueReady) = 1;
  return true;
}

void Disk::read_config() {
  // The device counts a generation up when it changes; read again until it stands still.
  uint32_t generation = 0;
  do {
    generation = reg(kConfigGeneration);
    config_.capacity = config32(0) | (uint64_t{config32(4)} << 32);
    config_.size_max = config32(8);
    config_.seg_max = config32(12);
    config_.blk_size = config32(20);
    const uint32_t topology = config32(24);
    config_.physical_exponent = static_cast<uint8_t>(topology);
    config_.alignment_offset = static_cast<uint8_t>(topology >> 8);
    config_.min_io = static_cast<uint16_t>(topology >> 16);
    config_.opt_io = config32(28);
    const uint32_t cache_and_queues = config32(kWceOffset);
    config_.wce = static_cast<uint8_t>(cache_and_queues);
    config_.num_queues = static_cast<uint16_t>(cache_and_queues >> 16);
    config_.max_discard_sectors = config32(36);
    config_.max_discard_seg = config32(40);
    config_.discard_alignment = config32(44);
    config_.max_zeroes_sectors = config32(48);
    config_.max_zeroes_seg = config32(52);
    config_.zeroes_may_unmap = *reinterpret_cast<volatile uint8_t*>(base_ + kConfig + 56);
  } while (generation != reg(kConfigGeneration));
}

void Disk::set_write_cache(bool on) {
  *reinterpret_cast<volatile uint8_t*>(base_ + kConfig + kWceOffset) = on ? 1 : 0;
  read_config();
}

uint64_t Disk::request_max() const {
  uint64_t segments = kMaxSegments;
  if (has(kFeatureSegMax) && config_.seg_max != 0 && config_.seg_max < segments) {
    segments = config_.seg_max;
  }
  if (!has(kFeatureSegMax)) segments = 1;
  const uint64_t segment =
      has(kFeatureSizeMax) && config_.size_max != 0 ? config_.size_max : uint64_t{1} << 30;
  return segments * segment;
}

void Disk::describe(Line& line) const {
  line.key("capacity", bytes()).key("queues", queue_count_).key("queue_size", queue_[0].size());
  line.text(" features=");
  bool first = true;
  for (const auto& feature : kFeatures) {
    if (!has(feature.bit)) continue;
    if (!first) line.text(",");
    line.text(feature.name);
    first = false;
  }
  line.text(" offered=").hex(offered_);
  if (has(kFeatureBlkSize)) line.key("blk_size", config_.blk_size);
  if (has(kFeatureTopology)) {
    line.key("physical_exponent", config_.physical_exponent);
    line.key("alignment_offset", config_.alignment_offset);
    line.key("min_io", config_.min_io).key("opt_io", config_.opt_io);
  }
  if (has(kFeatureSizeMax)) line.key("size_max", config_.size_max);
  if (has(kFeatureSegMax)) line.key("seg_max", config_.seg_max);
  if (has(kFeatureConfigWce)) line.key("wce", config_.wce);
  if (has(kFeatureMq)) line.key("num_queues", config_.num_queues);
  if (has(kFeatureDiscard)) {
    line.key("max_discard_sectors", config_.max_discard_sectors);
    line.key("max_discard_seg", config_.max_discard_seg);
    line.key("discard_alignment", config_.discard_alignment);
  }
  if (has(kFeatureWriteZeroes)) {
    line.key("max_zeroes_sectors", config_.max_zeroes_sectors);
    line.key("max_zeroes_seg", config_.max_zeroes_seg);
    line.key("zeroes_may_unmap", config_.zeroes_may_unmap);
  }
}

void Disk::begin(const IoOptions& options) {
  options_ = options;
  if (!has(kFeatureIndirect)) options_.queue.indirect = false;
  if (has(kFeatureSizeMax)) options_.queue.segment_max = config_.size_max;
  if (!has(kFeatureSegMax)) {
    options_.queue.segments = 1;
  } else if (options_.queue.segments > config_.seg_max && config_.seg_max != 0) {
    options_.queue.segments = config_.seg_max;
  }
  error_ = {};
  for (unsigned i = 0; i < queue_count_; ++i) queue_[i].want_interrupt(false);
}

bool Disk::add(Request& request) {
  const unsigned index =
      options_.only_queue >= 0 ? static_cast<unsigned>(options_.only_queue) : next_queue_;
  bool bad = false;
  if (!queue_[index].add(request, options_.queue, &bad)) {
    if (bad) error_ = "request needs more descriptors than there are";
    return false;
  }
  next_queue_ = (next_queue_ + 1) % queue_count_;
  return true;
}

void Disk::notify(unsigned index) { reg(kQueueNotify) = index; }

void Disk::kick() {
  for (unsigned i = 0; i < queue_count_; ++i) queue_[i].kick();
}

Request* Disk::take() {
  for (unsigned i = 0; i < queue_count_; ++i) {
    bool broken = false;
    if (Request* request = queue_[i].take(&broken)) return request;
    if (broken) error_ = "device returned a request that it does not have";
  }
  return nullptr;
}

bool Disk::has_completed() const {
  for (unsigned i = 0; i < queue_count_; ++i) {
    if (queue_[i].has_completed()) return true;
  }
  return false;
}

void Disk::sleep() {
  const uint32_t seen = device_irqs(slot_);
  for (unsigned i = 0; i < queue_count_; ++i) queue_[i].want_interrupt(true);
  if (!has_completed()) sleep_for_device(slot_, seen);
  for (unsigned i = 0; i < queue_count_; ++i) queue_[i].want_interrupt(false);
}

bool Disk::wait() {
  constexpr uint64_t kLookNs = 200ull * 1000 * 1000;
  const uint64_t begin = now_ns();
  uint64_t next_look = begin + kLookNs;
  for (uint32_t round = 1; !has_completed(); ++round) {
    if (!error_.empty()) return false;
    if (options_.poll) {
      pause();
      if ((round & 0xfff) != 0) continue;
    } else {
      sleep();
    }
    // Reading the status register leaves the guest, so only now and then.
    const uint64_t now = now_ns();
    if (now < next_look) continue;
    next_look = now + kLookNs;
    if ((reg(kStatus) & kNeedsReset) != 0) {
      error_ = "device needs a reset";
      return false;
    }
    if (now - begin >= kTimeoutNs) {
      error_ = "request timed out";
      return false;
    }
  }
  return true;
}

bool Disk::drain() {
  while (in_flight() != 0) {
    if (!wait()) return false;
    while (take() != nullptr) {
    }
    if (!error_.empty()) return false;
  }
  return true;
}

uint32_t Disk::in_flight() const {
  uint32_t sum = 0;
  for (unsigned i = 0; i < queue_count_; ++i) sum += queue_[i].in_flight();
  return sum;
}

bool Disk::run(Request& request) {
  if (!add(request)) return false;
  kick();
  while (!request.done) {
    if (!wait()) return false;
    take();
  }
  return true;
}

uint64_t Disk::kicks() const {
  uint64_t sum = 0;
  for (unsigned i = 0; i < queue_count_; ++i) sum += queue_[i].kicks();
  return sum;
}

}  // namespace minivmm::probe
