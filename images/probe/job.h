// SPDX-License-Identifier: Apache-2.0
// What jobs share: the disks, one result line, and a stream of requests over a range.
#pragma once

#include <cstdint>

#include "disk.h"
#include "options.h"
#include "string_view.h"
#include "text.h"

namespace minivmm::probe {

inline constexpr unsigned kMaxDisks = 16;
inline constexpr uint64_t kMaxDepth = 128;

struct Disks {
  Disk disk[kMaxDisks];
  unsigned count = 0;
};

// The line a job ends with: "probe: NAME ok key=value ..." or "probe: NAME FAILED ... error=...".
class Result {
 public:
  explicit Result(StringView name) : name_(name) {}
  Line& keys() { return keys_; }
  // The first error counts. Returns false, for `return result.fail(...)`.
  bool fail(StringView why);
  bool failed() const { return !error_.empty(); }
  void print_line() const;

 private:
  StringView name_;
  StringView error_;
  Line keys_;
};

// Checks the options of a job that works on a range, sets `length` to what it means, and prepares
// the disk. Null with the result failed where something is wrong.
Disk* prepare(Disks& disks, Options& options, Result& result);

// Runs requests over [offset, offset + length), `depth` in flight, each of at most `bs` bytes.
// Completions are handed over in the order of offsets, so that a checksum can be made.
class Stream {
 public:
  // False with the result failed.
  bool run(Disk& disk, const Options& options, uint32_t type, Result& result);
  uint64_t requests() const { return requests_; }

 protected:
  ~Stream() = default;  // never deleted through this type: there is no heap
  // Before a request goes out / after it came back. `after` returns false to stop.
  virtual void before(uint64_t, void*, uint64_t) {}
  virtual bool after(uint64_t, void*, uint64_t, Result&) { return true; }

 private:
  uint64_t requests_ = 0;
};

StringView status_text(uint8_t status);

// The jobs. Each returns with the result filled in.
void job_info(Disks& disks, Options& options, Result& result);
void job_read(Disks& disks, Options& options, Result& result);
void job_write(Disks& disks, Options& options, Result& result);
void job_verify(Disks& disks, Options& options, Result& result);
void job_flush(Disks& disks, Options& options, Result& result);
void job_discard(Disks& disks, Options& options, Result& result);
void job_zero(Disks& disks, Options& options, Result& result);
void job_survey(Disks& disks, Options& options, Result& result);
void job_wce(Disks& disks, Options& options, Result& result);
void job_reset(Disks& disks, Options& options, Result& result);
void job_errors(Disks& disks, Options& options, Result& result);
void job_hostile(Disks& disks, Options& options, Result& result);
void job_idle(Disks& disks, Options& options, Result& result);
void job_stress(Disks& disks, Options& options, Result& result);
void job_bench(Disks& disks, Options& options, Result& result);

// Runs one job given as text and prints its result line. False if it failed.
bool run_job(Disks& disks, StringView text, StringView separators);
// Reads jobs from the serial line until `exit`. Sets `*status` where `exit` gave one (else -1).
bool run_shell(Disks& disks, const Options& options, int* status);

}  // namespace minivmm::probe
