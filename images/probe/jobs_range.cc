// SPDX-License-Identifier: Apache-2.0
// Jobs that go over a range once.
#include "arch.h"
#include "arena.h"
#include "clock.h"
#include "job.h"
#include "pattern.h"
#include "sha256.h"

namespace minivmm::probe {
namespace {

// " bytes=N requests=N seconds=S mbps=M"
void add_rate(Line& keys, uint64_t bytes, uint64_t requests, uint64_t ns) {
  keys.key("bytes", bytes).key("requests", requests);
  keys.text(" seconds=").fixed(ns / 10000000);
  const uint64_t us = ns / 1000 == 0 ? 1 : ns / 1000;
  keys.text(" mbps=").fixed(bytes * 100 / us);
}

class ReadStream final : public Stream {
 public:
  explicit ReadStream(bool sum) : sum_(sum) {}
  Sha256 hash;

 protected:
  bool after(uint64_t, void* data, uint64_t bytes, Result&) override {
    if (sum_) hash.add(data, bytes);
    return true;
  }

 private:
  bool sum_;
};

class DumpStream final : public Stream {
 protected:
  bool after(uint64_t offset, void* data, uint64_t bytes, Result&) override {
    const auto* at = static_cast<const uint8_t*>(data);
    for (uint64_t i = 0; i < bytes; i += 16) {
      Line line;
      line.text("probe: dump ").hex(offset + i).text(" ").hex_bytes(at + i, 16).text(" |");
      for (unsigned j = 0; j < 16; ++j) {
        const char c = static_cast<char>(at[i + j]);
        line.text({c >= ' ' && c <= '~' ? &c : ".", 1});
      }
      line.text("|");
      print(line);
    }
    return true;
  }
};

class WriteStream final : public Stream {
 public:
  explicit WriteStream(const Options& options) : options_(options) {}

 protected:
  void before(uint64_t offset, void* data, uint64_t bytes) override {
    fill_pattern(options_, offset, data, bytes);
  }

 private:
  const Options& options_;
};

class VerifyStream final : public Stream {
 public:
  explicit VerifyStream(const Options& options) : options_(options) {}
  uint64_t wrong = 0;
  uint64_t first = 0;

 protected:
  bool after(uint64_t offset, void* data, uint64_t bytes, Result&) override {
    uint64_t first_here = 0;
    const uint64_t wrong_here = check_pattern(options_, offset, data, bytes, &first_here);
    if (wrong == 0 && wrong_here != 0) first = first_here;
    wrong += wrong_here;
    return true;
  }

 private:
  const Options& options_;
};

class SurveyStream final : public Stream {
 public:
  uint64_t stamps = 0, zero = 0, foreign = 0, damaged = 0, first_damaged = 0, highest = 0;

 protected:
  bool after(uint64_t offset, void* data, uint64_t bytes, Result&) override {
    for (uint64_t at = 0; at < bytes; at += kSectorBytes) {
      Stamp stamp;
      const auto* words = reinterpret_cast<const uint64_t*>(static_cast<uint8_t*>(data) + at);
      switch (read_stamp(words, offset + at, &stamp)) {
        case SectorKind::kStamp:
          ++stamps;
          if (stamp.sequence > highest) highest = stamp.sequence;
          break;
        case SectorKind::kZero:
          ++zero;
          break;
        case SectorKind::kForeign:
          ++foreign;
          break;
        case SectorKind::kDamaged:
          if (damaged++ == 0) first_damaged = offset + at;
          break;
      }
    }
    return true;
  }
};

// Requests that carry a list of ranges: discard and write zeroes.
struct Segment {
  uint64_t sector;
  uint32_t sectors;
  uint32_t flags;
};

void run_ranges(Disk& disk, const Options& options, uint32_t type, uint32_t max_sectors,
                uint32_t max_segments, Result& result) {
  const Arena::Scope scope;
  if (max_sectors == 0) max_sectors = 0xffffffff;
  const uint64_t granule = disk.block_size() / 512;
  max_sectors -= static_cast<uint32_t>(max_sectors % granule);
  uint64_t per_request = options.segments < max_segments ? options.segments : max_segments;
  if (per_request == 0) per_request = 1;
  auto* list = static_cast<Segment*>(Arena::allocate(sizeof(Segment) * per_request));
  const uint64_t limit = options.bs_given ? options.bs / 512 : max_sectors;
  if (list == nullptr || max_sectors == 0) {
    result.fail("device limits leave no room");
    return;
  }
  uint64_t sector = options.offset / 512;
  const uint64_t end = sector + options.length / 512;
  uint64_t requests = 0;
  IoOptions io;
  io.queue.indirect = options.indirect;
  io.poll = options.poll;
  io.only_queue = options.queue;
  disk.begin(io);
  while (sector < end) {
    uint32_t used = 0;
    for (; used < per_request && sector < end; ++used) {
      uint64_t n = end - sector < limit ? end - sector : limit;
      if (n > max_sectors) n = max_sectors;
      list[used] = {sector, static_cast<uint32_t>(n), options.unmap ? 1u : 0u};
      sector += n;
    }
    Request request;
    request.type = type;
    request.data = list;
    request.length = static_cast<uint32_t>(sizeof(Segment) * used);
    if (!disk.run(request)) {
      result.fail(disk.error());
      disk.restart();
      return;
    }
    ++requests;
    if (request.status != kBlkOk) {
      result.fail(status_text(request.status));
      return;
    }
  }
  result.keys().key("bytes", options.length).key("requests", requests);
}

}  // namespace

void job_info(Disks& disks, Options&, Result& result) {
  for (unsigned i = 0; i < disks.count; ++i) {
    Disk& disk = disks.disk[i];
    disk.read_config();
    disk.begin({});
    Line line;
    line.text("probe:").key("disk", i);
    disk.describe(line);
    alignas(16) char id[24] = {};
    Request request;
    request.type = kBlkGetId;
    request.data = id;
    request.length = 20;
    if (disk.run(request) && request.status == kBlkOk) {
      line.text(" id=\"").printable(id, 20).text("\"");
    }
    print(line);
    if (!disk.error().empty()) result.fail(disk.error());
  }
  result.keys().key("disks", disks.count).key("memory", Arena::available());
  result.keys().key("tsc_khz", clock_khz()).text(" clock=\"").text(clock_source()).text("\"");
}

void job_read(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (options.dump) {
    DumpStream stream;
    stream.run(*disk, options, kBlkIn, result);
    result.keys().key("bytes", options.length);
    return;
  }
  ReadStream stream(options.sum);
  const uint64_t begin = now_ns();
  if (!stream.run(*disk, options, kBlkIn, result)) return;
  add_rate(result.keys(), options.length, stream.requests(), now_ns() - begin);
  if (options.sum) {
    uint8_t digest[Sha256::kBytes];
    stream.hash.finish(digest);
    result.keys().text(" sha256=").hex_bytes(digest, sizeof digest);
  }
}

void job_write(Disks& disks, Options& options, Result& result) {
  if (options.pattern == PatternKind::kText && options.length == ~uint64_t{0} &&
      options.disk < disks.count) {
    // A text fills the blocks it needs and no more.
    const uint64_t block = disks.disk[options.disk].block_size();
    options.length = (options.text.size() / block + 1) * block;
  }
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (disk->has(kFeatureRo) && !options.force) {
    result.fail("disk is read-only");
    return;
  }
  WriteStream stream(options);
  const uint64_t begin = now_ns();
  if (!stream.run(*disk, options, kBlkOut, result)) return;
  add_rate(result.keys(), options.length, stream.requests(), now_ns() - begin);
}

void job_verify(Disks& disks, Options& options, Result& result) {
  if (options.pattern == PatternKind::kText && options.length == ~uint64_t{0} &&
      options.disk < disks.count) {
    const uint64_t block = disks.disk[options.disk].block_size();
    options.length = (options.text.size() / block + 1) * block;
  }
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  VerifyStream stream(options);
  const uint64_t begin = now_ns();
  if (!stream.run(*disk, options, kBlkIn, result)) return;
  add_rate(result.keys(), options.length, stream.requests(), now_ns() - begin);
  if (stream.wrong != 0) {
    result.keys().key("wrong_sectors", stream.wrong).key("first_wrong", stream.first);
    result.fail("content differs");
  }
}

void job_survey(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  SurveyStream stream;
  if (!stream.run(*disk, options, kBlkIn, result)) return;
  result.keys().key("stamps", stream.stamps).key("zero", stream.zero);
  result.keys().key("foreign", stream.foreign).key("damaged", stream.damaged);
  result.keys().key("highest_sequence", stream.highest);
  if (stream.damaged != 0) {
    result.keys().key("first_damaged", stream.first_damaged);
    result.fail("damaged stamps");
  }
}

void job_flush(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (!disk->has(kFeatureFlush) && !options.force) {
    result.fail("device does not offer FLUSH");
    return;
  }
  Request request;
  request.type = kBlkFlush;
  if (!disk->run(request)) {
    result.fail(disk->error());
    disk->restart();
  } else if (request.status != kBlkOk) {
    result.fail(status_text(request.status));
  }
}

void job_discard(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (!disk->has(kFeatureDiscard) && !options.force) {
    result.fail("device does not offer DISCARD");
    return;
  }
  // The unmap flag belongs to WRITE_ZEROES only.
  options.unmap = false;
  run_ranges(*disk, options, kBlkDiscard, disk->config().max_discard_sectors,
             disk->config().max_discard_seg, result);
}

void job_zero(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (!disk->has(kFeatureWriteZeroes) && !options.force) {
    result.fail("device does not offer WRITE_ZEROES");
    return;
  }
  run_ranges(*disk, options, kBlkWriteZeroes, disk->config().max_zeroes_sectors,
             disk->config().max_zeroes_seg, result);
}

}  // namespace minivmm::probe
