// SPDX-License-Identifier: Apache-2.0
// Jobs about the device rather than its content.
#include "arch.h"
#include "arena.h"
#include "clock.h"
#include "job.h"

namespace minivmm::probe {
namespace {

struct ErrorCase {
  StringView what;
  uint32_t type;
  uint64_t sector;
  uint32_t length;
  uint8_t expected;
};

bool expect_status(Disk& disk, const ErrorCase& test, void* buffer, Result& result) {
  Request request;
  request.type = test.type;
  request.sector = test.sector;
  request.data = buffer;
  request.length = test.length;
  disk.begin({});
  if (!disk.run(request)) {
    result.fail(disk.error());
    disk.restart();
    return false;
  }
  if (request.status == test.expected) return true;
  Line line;
  line.text("probe: ").text(test.what).key("status", request.status);
  line.key("expected", test.expected);
  print(line);
  return result.fail("device answered wrongly");
}

}  // namespace

void job_wce(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  if (!disk->has(kFeatureConfigWce)) {
    result.fail("device does not offer CONFIG_WCE");
    return;
  }
  disk->set_write_cache(options.on);
  result.keys().key("wce", disk->config().wce);
  if (disk->config().wce != (options.on ? 1 : 0)) result.fail("device did not take the setting");
}

void job_reset(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  const StringView problem = disk->restart();
  if (!problem.empty()) result.fail(problem);
}

// Requests that the protocol allows to be made and that a device must refuse without harm.
void job_errors(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  const Arena::Scope scope;
  void* buffer = Arena::allocate(4096);
  if (buffer == nullptr) {
    result.fail("not enough memory");
    return;
  }
  const uint64_t end = disk->bytes() / 512;
  const ErrorCase cases[] = {
      {"read behind the end", kBlkIn, end, 512, kBlkIoError},
      {"read over the end", kBlkIn, end - 1, 4096, kBlkIoError},
      {"read at a sector that overflows", kBlkIn, ~uint64_t{0}, 512, kBlkIoError},
      {"read at a byte that overflows", kBlkIn, uint64_t{1} << 55, 512, kBlkIoError},
      {"read of part of a sector", kBlkIn, 0, 100, kBlkIoError},
      {"write behind the end", kBlkOut, end, 512, kBlkIoError},
      {"write of part of a sector", kBlkOut, 0, 100, kBlkIoError},
      {"request of an unknown type", 0x7777, 0, 512, kBlkUnsupported},
  };
  uint64_t checked = 0;
  for (const auto& test : cases) {
    if (!expect_status(*disk, test, buffer, result)) return;
    ++checked;
  }
  if (disk->has(kFeatureRo)) {
    if (!expect_status(*disk, {"write to a read-only disk", kBlkOut, 0, 512, kBlkIoError}, buffer,
                       result)) {
      return;
    }
    ++checked;
  }
  struct {
    uint64_t sector;
    uint32_t sectors, flags;
  } range = {end, 8, 0};
  if (disk->has(kFeatureDiscard) && !disk->has(kFeatureRo)) {
    const ErrorCase behind = {"discard behind the end", kBlkDiscard, 0, 16, kBlkIoError};
    if (!expect_status(*disk, behind, &range, result)) return;
    range = {0, 8, 1};
    const ErrorCase flags = {"discard with a flag", kBlkDiscard, 0, 16, kBlkUnsupported};
    if (!expect_status(*disk, flags, &range, result)) return;
    checked += 2;
  }
  const ErrorCase good = {"read of the first sectors", kBlkIn, 0, 4096, kBlkOk};
  if (expect_status(*disk, good, buffer, result)) result.keys().key("checked", checked + 1);
}

void job_idle(Disks&, Options& options, Result& result) {
  const uint64_t begin = now_ns();
  const uint64_t end = begin + options.seconds_hundredths * 10000000;
  while (now_ns() < end) sleep_for_tick();
  result.keys().text(" seconds=").fixed((now_ns() - begin) / 10000000);
}

}  // namespace minivmm::probe
