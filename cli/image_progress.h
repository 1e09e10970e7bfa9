// SPDX-License-Identifier: Apache-2.0
// How far a command is, while its job runs: qemu-img's percent (-p), a live bar with rate and time
// left on a terminal, and an answer to SIGUSR1. SIGINT, SIGTERM and SIGHUP ask the job to stop.
//
// One at a time in the process. Made and destroyed on a fiber; a fiber of the same loop prints.
#pragma once

#include <string>

#include <cstdint>
#include <functional>

#include "base/event_loop.h"
#include "base/sync.h"

namespace minivmm::cli {

struct ProgressState {
  uint64_t done = 0;
  uint64_t total = 0;  // in the unit of `done`; 0: nothing to do
  uint64_t bytes = 0;  // of data, for the rate
};

// "    (12.34/100%)": as qemu-img prints it.
std::string percent_text(const ProgressState& state);
// "[######........] 42.1%  1.2 GiB/s  0:12 left".
std::string bar_text(const ProgressState& state, double seconds);

class ProgressMeter {
 public:
  enum class Style { kNone, kPercent, kBar };
  // kPercent for -p, otherwise a bar where standard error is a terminal and `live` is allowed.
  static Style choose(bool percent, bool quiet, bool live = true);

  // `state` is called on the printing fiber, `stop` on a signal, at most once a signal.
  ProgressMeter(Style style, std::function<ProgressState()> state, std::function<void()> stop);
  // Stops printing. Without finish() before, the line is only ended.
  ~ProgressMeter();
  ProgressMeter(const ProgressMeter&) = delete;
  ProgressMeter& operator=(const ProgressMeter&) = delete;

  // The job is done: prints 100%.
  void finish();

 private:
  void print_until_ended();
  void print(bool last);

  const Style style_;
  const std::function<ProgressState()> state_;
  const std::function<void()> stop_;
  const base::Clock::time_point began_;
  std::string last_line_;
  bool finished_ = false;
  base::Event end_;
  base::WaitGroup printer_;
};

// Where a signal asked a job to stop: ends the process by it, so that a shell sees what happened
// and does not go on with the next command. Returns where none did.
void end_by_stop_signal();

}  // namespace minivmm::cli
