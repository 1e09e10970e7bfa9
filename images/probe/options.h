// SPDX-License-Identifier: Apache-2.0
// A job as written by the user: its name and options. README.md has the syntax.
#pragma once

#include <cstdint>

#include "string_view.h"

namespace minivmm::probe {

enum class PatternKind { kByte, kRandom, kStamp, kText };

struct Options {
  StringView name;
  uint64_t disk = 0;
  uint64_t offset = 0;
  uint64_t length = ~uint64_t{0};  // to the end of the disk
  uint64_t bs = 65536;             // bytes of one request
  bool bs_given = false;
  uint64_t depth = 8;  // requests in flight
  uint64_t segments = 1;
  int queue = -1;  // -1: all in turn
  bool poll = false;
  bool indirect = true;
  PatternKind pattern = PatternKind::kStamp;
  uint8_t byte = 0;
  StringView text;
  uint64_t seed = 1;
  uint64_t seconds_hundredths = 200;
  uint64_t count = 0;  // requests; 0 = until the time is over
  uint64_t first = 1;  // sequence number of the first request
  uint64_t writer = 1;
  uint64_t max_blocks = 8;
  StringView rw = "randread";
  bool sum = true;
  bool dump = false;
  bool force = false;
  bool unmap = false;
  bool shared = false;
  bool log = false;
  bool tolerate = false;
  bool zeroes = false;
  bool discards = false;
  bool echo = true;
  bool on = true;       // of `wce`
  uint64_t status = 0;  // of `exit`
  bool status_given = false;
};

// Reads one job; words are separated by any of `separators`. On an error returns a text and sets
// `*word` to what was not understood; otherwise "".
StringView parse_job(StringView job, StringView separators, Options* out, StringView* word);

}  // namespace minivmm::probe
