// SPDX-License-Identifier: Apache-2.0
#include "job.h"

#include "arena.h"

namespace minivmm::probe {

bool Result::fail(StringView why) {
  if (error_.empty()) error_ = why;
  return false;
}

void Result::print_line() const {
  Line line;
  line.text("probe: ").text(name_).text(failed() ? " FAILED" : " ok").text(keys_.view());
  if (failed()) line.text(" error=\"").text(error_).text("\"");
  print(line);
}

StringView status_text(uint8_t status) {
  switch (status) {
    case kBlkIoError:
      return "device reported an I/O error";
    case kBlkUnsupported:
      return "device does not support the request";
    case kStatusNotWritten:
      return "device completed the request without a status";
    default:
      return "device reported a status that does not exist";
  }
}

Disk* prepare(Disks& disks, Options& options, Result& result) {
  const auto fail = [&](StringView why) {
    result.fail(why);
    return nullptr;
  };
  if (options.disk >= disks.count) return fail("no such disk");
  Disk& disk = disks.disk[options.disk];
  result.keys().key("disk", options.disk);
  if (options.depth == 0 || options.depth > kMaxDepth) return fail("depth must be 1 to 128");
  if (options.segments == 0 || options.segments > kMaxSegments) {
    return fail("segments must be 1 to 32");
  }
  if (options.queue >= static_cast<int>(disk.queues())) return fail("no such queue");
  const uint64_t block = disk.block_size();
  if (block < 512 || block % 512 != 0) return fail("device has an impossible block size");
  if (options.offset > disk.bytes()) return fail("offset is behind the end of the disk");
  if (options.length == ~uint64_t{0}) options.length = disk.bytes() - options.offset;
  if (options.length > disk.bytes() - options.offset) {
    return fail("range ends behind the end of the disk");
  }
  if (options.bs < block && !options.bs_given) options.bs = block;
  if (options.bs == 0 || options.bs % block != 0 || options.bs > (uint64_t{64} << 20)) {
    return fail("bs must be a multiple of the block size, at most 64M");
  }
  if (options.offset % block != 0 || options.length % block != 0) {
    return fail("offset and length must be multiples of the block size");
  }
  if (options.bs > disk.request_max()) return fail("bs is more than the device takes at once");
  IoOptions io;
  io.queue.indirect = options.indirect;
  io.queue.segments = static_cast<uint32_t>(options.segments);
  io.poll = options.poll;
  io.only_queue = options.queue;
  disk.begin(io);
  return &disk;
}

bool Stream::run(Disk& disk, const Options& options, uint32_t type, Result& result) {
  const Arena::Scope scope;
  auto* requests = static_cast<Request*>(Arena::allocate(sizeof(Request) * options.depth));
  auto* buffers = static_cast<uint8_t*>(Arena::allocate(options.bs * options.depth));
  if (requests == nullptr || buffers == nullptr) {
    return result.fail("not enough memory for depth * bs");
  }
  const uint64_t end = options.offset + options.length;
  uint64_t issue = options.offset;
  uint64_t finish = options.offset;
  uint64_t issued = 0;
  uint64_t finished = 0;
  while (finish < end && !result.failed()) {
    while (issue < end && issued - finished < options.depth) {
      const uint64_t n = issued % options.depth;
      Request& request = requests[n];
      const uint64_t bytes = end - issue < options.bs ? end - issue : options.bs;
      request = Request();
      request.type = type;
      request.sector = issue / 512;
      request.data = buffers + n * options.bs;
      request.length = static_cast<uint32_t>(bytes);
      before(issue, request.data, bytes);
      if (!disk.add(request)) break;
      issue += bytes;
      ++issued;
    }
    disk.kick();
    Request& oldest = requests[finished % options.depth];
    while (issued != finished && !oldest.done && disk.error().empty()) {
      if (disk.take() == nullptr) disk.wait();
    }
    if (!disk.error().empty()) {
      result.fail(disk.error());
      break;
    }
    if (oldest.status != kBlkOk) {
      result.keys().key("failed_at", finish);
      result.fail(status_text(oldest.status));
      break;
    }
    const uint64_t expected = type == kBlkIn ? oldest.length + 1 : 1;
    if (oldest.written != expected) {
      result.keys().key("failed_at", finish).key("written", oldest.written);
      result.fail("device says it wrote another number of bytes than it should");
      break;
    }
    if (!after(finish, oldest.data, oldest.length, result)) break;
    finish += oldest.length;
    ++finished;
    ++requests_;
  }
  // The buffers go away with this function, so nothing may be in flight when it ends.
  if (!disk.drain()) {
    result.fail(disk.error());
    disk.restart();
  }
  return !result.failed();
}

}  // namespace minivmm::probe
