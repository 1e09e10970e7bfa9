// SPDX-License-Identifier: Apache-2.0
// How fast a disk is: `depth` requests always in flight for some seconds.
#include "arch.h"
#include "arena.h"
#include "clock.h"
#include "job.h"
#include "stamp.h"

namespace minivmm::probe {
namespace {

// Latencies in buckets of an eighth of an octave.
class Histogram {
 public:
  void add(uint64_t ns) {
    const unsigned octave = 63 - static_cast<unsigned>(__builtin_clzll(ns | 8));
    ++buckets_[octave * 8 + ((ns >> (octave - 3)) & 7)];
    ++count_;
    sum_ += ns;
    if (ns > max_) max_ = ns;
  }
  // Upper edge, in ns, of the bucket in which the given share of the requests ends.
  uint64_t percentile(uint64_t percent) const {
    uint64_t left = (count_ * percent + 99) / 100;
    for (unsigned i = 0; i < 512; ++i) {
      if (buckets_[i] >= left && left > 0) return (uint64_t{8 + i % 8 + 1}) << (i / 8) >> 3;
      left -= buckets_[i];
    }
    return max_;
  }
  uint64_t average() const { return count_ == 0 ? 0 : sum_ / count_; }
  uint64_t max() const { return max_; }
  uint64_t count() const { return count_; }

 private:
  uint64_t buckets_[512];
  uint64_t count_;
  uint64_t sum_;
  uint64_t max_;
};

class Bench {
 public:
  Bench(Disk& disk, const Options& options, Result& result)
      : disk_(disk), options_(options), result_(result) {}

  void run() {
    const Arena::Scope scope;
    requests_ = static_cast<Request*>(Arena::allocate(sizeof(Request) * options_.depth));
    buffers_ = static_cast<uint8_t*>(Arena::allocate(options_.bs * options_.depth));
    latency_ = static_cast<Histogram*>(Arena::allocate(sizeof(Histogram)));
    if (requests_ == nullptr || buffers_ == nullptr || latency_ == nullptr) {
      result_.fail("not enough memory for depth * bs");
      return;
    }
    if (!choose_mode()) return;
    blocks_ = options_.length / options_.bs;
    if (blocks_ == 0) {
      result_.fail("range is smaller than bs");
      return;
    }
    fill_buffers();
    const uint64_t kicks = disk_.kicks();
    const uint64_t irqs = device_irqs(disk_.slot());
    const uint64_t begin = now_ns();
    loop(begin);
    const uint64_t ns = now_ns() - begin;
    // Whatever happened, nothing may be in flight when the buffers go away.
    if (!disk_.drain()) {
      result_.fail(disk_.error());
      disk_.restart();
    }
    report(ns, disk_.kicks() - kicks, device_irqs(disk_.slot()) - irqs);
  }

 private:
  bool choose_mode() {
    const StringView rw = options_.rw;
    random_ = rw == "randread" || rw == "randwrite" || rw == "randrw";
    read_percent_ = rw == "read" || rw == "randread" ? 100 : rw == "randrw" ? 70 : 0;
    if (!random_ && rw != "read" && rw != "write") {
      return result_.fail("rw must be read, write, randread, randwrite or randrw");
    }
    if (read_percent_ != 100 && disk_.has(kFeatureRo)) return result_.fail("disk is read-only");
    return true;
  }

  void fill_buffers() {
    auto* words = reinterpret_cast<uint64_t*>(buffers_);
    for (uint64_t i = 0; i < options_.bs * options_.depth / 8; ++i) words[i] = mix64(i);
  }

  bool submit(uint64_t slot, uint64_t now) {
    const uint64_t draw = mix64(options_.seed ^ mix64(issued_));
    Request& request = requests_[slot];
    request = Request();
    request.type = mix64(draw) % 100 < read_percent_ ? kBlkIn : kBlkOut;
    const uint64_t block = random_ ? draw % blocks_ : issued_ % blocks_;
    request.sector = (options_.offset + block * options_.bs) / 512;
    request.data = buffers_ + slot * options_.bs;
    request.length = static_cast<uint32_t>(options_.bs);
    request.tag = slot;
    request.begin_ns = now;
    if (!disk_.add(request)) return false;
    ++issued_;
    return true;
  }

  bool more(uint64_t now, uint64_t end) const {
    return options_.count != 0 ? issued_ < options_.count : now < end;
  }

  void loop(uint64_t begin) {
    const uint64_t end = begin + options_.seconds_hundredths * 10000000;
    uint64_t free_count = 0;
    for (uint64_t slot = options_.depth; slot-- > 0;) free_[free_count++] = slot;
    uint64_t now = begin;
    while (true) {
      while (free_count > 0 && more(now, end) && submit(free_[free_count - 1], now)) --free_count;
      disk_.kick();
      if (free_count == options_.depth || !disk_.error().empty()) break;
      Request* request = disk_.take();
      if (request == nullptr) {
        if (!disk_.wait()) break;
        continue;
      }
      now = now_ns();
      for (; request != nullptr; request = disk_.take()) {
        if (request->status != kBlkOk) {
          result_.fail(status_text(request->status));
          return;
        }
        latency_->add(now - request->begin_ns);
        free_[free_count++] = request->tag;
      }
    }
    if (!disk_.error().empty()) result_.fail(disk_.error());
  }

  void report(uint64_t ns, uint64_t kicks, uint64_t irqs) {
    const uint64_t us = ns / 1000 == 0 ? 1 : ns / 1000;
    const uint64_t done = latency_->count();
    Line& keys = result_.keys();
    keys.key("rw", options_.rw).key("bs", options_.bs).key("depth", options_.depth);
    keys.key("mode", options_.poll ? "poll" : "irq").text(" seconds=").fixed(ns / 10000000);
    keys.key("requests", done).key("iops", done * 1000000 / us);
    keys.text(" mbps=").fixed(done * options_.bs * 100 / us);
    keys.text(" lat_avg_us=").fixed(latency_->average() / 10);
    keys.text(" lat_p50_us=").fixed(latency_->percentile(50) / 10);
    keys.text(" lat_p99_us=").fixed(latency_->percentile(99) / 10);
    keys.text(" lat_max_us=").fixed(latency_->max() / 10);
    keys.key("kicks", kicks).key("irqs", irqs);
  }

  Disk& disk_;
  const Options& options_;
  Result& result_;
  Request* requests_ = nullptr;
  uint8_t* buffers_ = nullptr;
  Histogram* latency_ = nullptr;
  uint64_t free_[kMaxDepth];
  uint64_t blocks_ = 0;
  uint64_t issued_ = 0;
  uint64_t read_percent_ = 100;
  bool random_ = true;
};

}  // namespace

void job_bench(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  Bench(*disk, options, result).run();
}

}  // namespace minivmm::probe
