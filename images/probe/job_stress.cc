// SPDX-License-Identifier: Apache-2.0
// Random requests whose outcome is known: every block that was written carries the number of the
// request that wrote it, reads are compared on the way, and at the end the whole range is.
// Requests that overlap are never in flight together, so there is one right answer.
#include "arch.h"
#include "arena.h"
#include "clock.h"
#include "job.h"
#include "stress_plan.h"

namespace minivmm::probe {
namespace {

struct Segment {
  uint64_t sector;
  uint32_t sectors;
  uint32_t flags;
};

struct Slot {
  Request request;
  StressRequest plan;
  uint64_t sequence;  // 0: free
  uint64_t durable;   // of a flush: requests up to here were done when it was sent
  Segment segment;
  uint64_t* buffer;
};

uint32_t request_type(StressOp op) {
  switch (op) {
    case StressOp::kWrite:
      return kBlkOut;
    case StressOp::kRead:
      return kBlkIn;
    case StressOp::kFlush:
      return kBlkFlush;
    case StressOp::kZero:
      return kBlkWriteZeroes;
    case StressOp::kDiscard:
      return kBlkDiscard;
  }
  return kBlkIn;
}

bool changes(StressOp op) {
  return op == StressOp::kWrite || op == StressOp::kZero || op == StressOp::kDiscard;
}

class Stress final : private Stream {
 public:
  Stress(Disk& disk, const Options& options, Result& result)
      : disk_(disk), options_(options), result_(result) {
    parameters_.seed = options.seed;
    parameters_.offset = options.offset;
    parameters_.block_size = static_cast<uint32_t>(options.bs);
    parameters_.blocks = options.length / options.bs;
    parameters_.max_blocks = static_cast<uint32_t>(options.max_blocks);
    parameters_.zeroes = options.zeroes;
    parameters_.discards = options.discards;
  }

  void run() {
    const Arena::Scope scope;
    if (!check() || !allocate()) return;
    const uint64_t begin = now_ns();
    loop(begin);
    if (!disk_.drain()) {
      result_.fail(disk_.error());
      disk_.restart();
    }
    const uint64_t ns = now_ns() - begin;
    if (!result_.failed()) final_flush();
    if (!result_.failed()) final_check();
    report(ns);
  }

 private:
  bool check() {
    if (disk_.has(kFeatureRo)) return result_.fail("disk is read-only");
    if (parameters_.blocks == 0) return result_.fail("range is smaller than bs");
    if (options_.max_blocks == 0 || options_.max_blocks > 256) {
      return result_.fail("max_blocks must be 1 to 256");
    }
    if (options_.max_blocks * options_.bs > disk_.request_max()) {
      return result_.fail("max_blocks * bs is more than the device takes at once");
    }
    if (options_.zeroes && !disk_.has(kFeatureWriteZeroes)) {
      return result_.fail("device does not offer WRITE_ZEROES");
    }
    if (options_.discards && !disk_.has(kFeatureDiscard)) {
      return result_.fail("device does not offer DISCARD");
    }
    if (options_.first == 0) return result_.fail("first must be at least 1");
    return true;
  }

  bool allocate() {
    last_ = static_cast<uint32_t*>(Arena::allocate(sizeof(uint32_t) * parameters_.blocks));
    slots_ = static_cast<Slot*>(Arena::allocate(sizeof(Slot) * options_.depth));
    const uint64_t bytes = options_.max_blocks * options_.bs;
    auto* buffers = static_cast<uint8_t*>(Arena::allocate(bytes * options_.depth));
    if (last_ == nullptr || slots_ == nullptr || buffers == nullptr) {
      return result_.fail("not enough memory: make the range, depth, bs or max_blocks smaller");
    }
    for (uint64_t i = 0; i < options_.depth; ++i) {
      slots_[i].buffer = reinterpret_cast<uint64_t*>(buffers + i * bytes);
    }
    return true;
  }

  void loop(uint64_t begin) {
    const uint64_t end = begin + options_.seconds_hundredths * 10000000;
    next_ = options_.first;
    while (!result_.failed()) {
      const uint64_t issued = next_ - options_.first;
      if (options_.count != 0 ? issued >= options_.count : now_ns() >= end) break;
      const StressRequest plan = stress_request(parameters_, next_);
      Slot* slot = free_slot();
      if (slot == nullptr || conflicts(plan) || !submit(*slot, plan)) {
        if (disk_.in_flight() == 0 && disk_.error().empty()) {
          result_.fail("request cannot be sent");
          break;
        }
        progress();
      }
    }
    while (!result_.failed() && disk_.in_flight() != 0) progress();
  }

  Slot* free_slot() {
    for (uint64_t i = 0; i < options_.depth; ++i) {
      if (slots_[i].sequence == 0) return &slots_[i];
    }
    return nullptr;
  }

  bool conflicts(const StressRequest& plan) const {
    if (plan.op == StressOp::kFlush) return false;
    for (uint64_t i = 0; i < options_.depth; ++i) {
      const Slot& slot = slots_[i];
      if (slot.sequence == 0 || slot.plan.op == StressOp::kFlush) continue;
      if (!changes(plan.op) && !changes(slot.plan.op)) continue;
      if (plan.block < slot.plan.block + slot.plan.count &&
          slot.plan.block < plan.block + plan.count) {
        return true;
      }
    }
    return false;
  }

  // Requests up to this number are done.
  uint64_t done_prefix() const {
    uint64_t oldest = next_;
    for (uint64_t i = 0; i < options_.depth; ++i) {
      if (slots_[i].sequence != 0 && slots_[i].sequence < oldest) oldest = slots_[i].sequence;
    }
    return oldest - 1;
  }

  bool submit(Slot& slot, const StressRequest& plan) {
    if (plan.op == StressOp::kFlush && !disk_.has(kFeatureFlush)) {
      ++next_;  // the plan has it, the device does not
      return true;
    }
    slot.plan = plan;
    slot.request = Request();
    Request& request = slot.request;
    request.type = request_type(plan.op);
    request.tag = reinterpret_cast<uint64_t>(&slot);
    const uint64_t at = parameters_.offset + plan.block * options_.bs;
    const uint64_t bytes = plan.count * options_.bs;
    if (plan.op == StressOp::kWrite || plan.op == StressOp::kRead) {
      request.sector = at / 512;
      request.data = slot.buffer;
      request.length = static_cast<uint32_t>(bytes);
    } else if (plan.op != StressOp::kFlush) {
      const bool unmap = plan.op == StressOp::kZero && options_.unmap;
      slot.segment = {at / 512, static_cast<uint32_t>(bytes / 512), unmap ? 1u : 0u};
      request.data = &slot.segment;
      request.length = sizeof slot.segment;
    }
    if (plan.op == StressOp::kWrite) fill(slot.buffer, at, bytes, next_);
    slot.durable = done_prefix();
    if (!disk_.add(request)) return false;
    if (changes(plan.op)) {
      for (uint32_t i = 0; i < plan.count; ++i) {
        last_[plan.block + i] = static_cast<uint32_t>(next_);
      }
    }
    slot.sequence = next_++;
    if ((next_ & 7) == 0) disk_.kick();
    return true;
  }

  void fill(uint64_t* words, uint64_t at, uint64_t bytes, uint64_t sequence) const {
    for (uint64_t i = 0; i < bytes; i += kSectorBytes) {
      fill_stamp(words + i / 8, {at + i, sequence, static_cast<uint32_t>(options_.writer),
                                 static_cast<uint32_t>(options_.seed)});
    }
  }

  void progress() {
    disk_.kick();
    Request* request = disk_.take();
    if (request == nullptr && disk_.wait()) request = disk_.take();
    if (!disk_.error().empty()) result_.fail(disk_.error());
    for (; request != nullptr; request = disk_.take()) {
      complete(*reinterpret_cast<Slot*>(request->tag));
    }
  }

  void complete(Slot& slot) {
    ++counts_[static_cast<unsigned>(slot.plan.op)];
    if (slot.request.status != kBlkOk) {
      failed_request(slot);
    } else if (slot.plan.op == StressOp::kRead) {
      check_blocks(slot.plan.block, slot.plan.count, slot.buffer);
    } else if (slot.plan.op == StressOp::kFlush && options_.log) {
      Line line;
      line.text("probe: flushed").key("disk", options_.disk).key("sequence", slot.durable);
      print(line);
    }
    slot.sequence = 0;
  }

  void failed_request(const Slot& slot) {
    ++errors_;
    if (!options_.tolerate) {
      result_.keys().key("failed_sequence", slot.sequence);
      result_.fail(status_text(slot.request.status));
    }
    // What such a request left behind is anybody's guess.
    if (!changes(slot.plan.op)) return;
    for (uint32_t i = 0; i < slot.plan.count; ++i) last_[slot.plan.block + i] = 0;
  }

  void check_blocks(uint64_t block, uint64_t count, const uint64_t* words) {
    for (uint64_t i = 0; i < count; ++i) {
      if (block_is_right(block + i, words + i * options_.bs / 8)) continue;
      if (wrong_++ != 0) continue;
      result_.keys().key("first_wrong", parameters_.offset + (block + i) * options_.bs);
      result_.keys().key("expected_sequence", last_[block + i]);
    }
    if (wrong_ != 0) result_.fail("content differs");
  }

  bool block_is_right(uint64_t block, const uint64_t* words) const {
    const uint64_t at = parameters_.offset + block * options_.bs;
    const uint64_t sequence = last_[block];
    const StressOp op =
        sequence == 0 ? StressOp::kDiscard : stress_request(parameters_, sequence).op;
    for (uint64_t i = 0; i < options_.bs; i += kSectorBytes) {
      Stamp found;
      const SectorKind kind = read_stamp(words + i / 8, at + i, &found);
      if (sequence == 0) continue;  // not known
      if (options_.shared || op == StressOp::kDiscard) {
        // Somebody else's or an older block will do, a torn one will not.
        if (kind == SectorKind::kDamaged) return false;
        continue;
      }
      if (op == StressOp::kZero) {
        if (kind != SectorKind::kZero) return false;
        continue;
      }
      const Stamp wanted{at + i, sequence, static_cast<uint32_t>(options_.writer),
                         static_cast<uint32_t>(options_.seed)};
      if (kind != SectorKind::kStamp || !(found == wanted)) return false;
    }
    return true;
  }

  void final_flush() {
    if (!disk_.has(kFeatureFlush)) return;
    Request request;
    request.type = kBlkFlush;
    if (!disk_.run(request)) {
      result_.fail(disk_.error());
      disk_.restart();
    } else if (request.status != kBlkOk) {
      result_.fail(status_text(request.status));
    } else if (options_.log) {
      Line line;
      line.text("probe: flushed").key("disk", options_.disk).key("sequence", next_ - 1);
      print(line);
    }
  }

  void final_check() {
    Options whole = options_;
    whole.length = parameters_.blocks * options_.bs;
    Stream::run(disk_, whole, kBlkIn, result_);
  }

  bool after(uint64_t offset, void* data, uint64_t bytes, Result&) override {
    check_blocks((offset - parameters_.offset) / options_.bs, bytes / options_.bs,
                 static_cast<uint64_t*>(data));
    return wrong_ == 0;
  }

  void report(uint64_t ns) {
    Line& keys = result_.keys();
    const uint64_t us = ns / 1000 == 0 ? 1 : ns / 1000;
    const uint64_t done = next_ - options_.first;
    keys.key("seed", options_.seed).key("first", options_.first).key("last", next_ - 1);
    keys.text(" seconds=").fixed(ns / 10000000).key("requests", done);
    keys.key("writes", counts_[0]).key("reads", counts_[1]).key("flushes", counts_[2]);
    keys.key("zeroes", counts_[3]).key("discards", counts_[4]);
    keys.key("iops", done * 1000000 / us).key("errors", errors_).key("wrong_blocks", wrong_);
  }

  Disk& disk_;
  const Options& options_;
  Result& result_;
  StressParameters parameters_;
  uint32_t* last_ = nullptr;  // per block: the last request that changed it, 0 = not known
  Slot* slots_ = nullptr;
  uint64_t next_ = 1;
  uint64_t counts_[5] = {};
  uint64_t errors_ = 0;
  uint64_t wrong_ = 0;
};

}  // namespace

void job_stress(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  Stress(*disk, options, result).run();
}

}  // namespace minivmm::probe
