// SPDX-License-Identifier: Apache-2.0
#include "cli/image_progress.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <utility>

#include <fmt/core.h>

#include "cli/image_info_output.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace {

constexpr auto kEvery = std::chrono::milliseconds(100);
constexpr int kBarWidth = 30;

std::atomic<bool> print_wanted{false};
std::atomic<int> stop_wanted{0};

void on_signal(int number) {
  if (number == SIGUSR1) {
    print_wanted.store(true);
  } else {
    stop_wanted.store(number);
  }
}

// What is not watched keeps its default meaning.
constexpr int kWatched[] = {SIGUSR1, SIGINT, SIGTERM, SIGHUP};

double fraction(const ProgressState& state) {
  if (state.total == 0) return 1.0;
  return std::min(1.0, static_cast<double>(state.done) / static_cast<double>(state.total));
}

}  // namespace

void end_by_stop_signal() {
  const int number = stop_wanted.load();
  if (number == 0) return;
  std::fflush(nullptr);
  ::signal(number, SIG_DFL);
  ::raise(number);
}

std::string percent_text(const ProgressState& state) {
  return fmt::format("    ({:.2f}/100%)", fraction(state) * 100);
}

std::string bar_text(const ProgressState& state, double seconds) {
  const double part = fraction(state);
  const auto filled = static_cast<size_t>(part * kBarWidth);
  std::string out = fmt::format("[{}{}] {:5.1f}%", std::string(filled, '#'),
                                std::string(kBarWidth - filled, '.'), part * 100);
  if (seconds <= 0) return out;
  const double rate = static_cast<double>(state.bytes) / seconds;
  out += fmt::format("  {}/s", size_text(static_cast<uint64_t>(rate)));
  // Too early, an estimate says nothing.
  if (part < 0.01 || seconds < 0.5 || part >= 1) return out;
  const auto left = static_cast<uint64_t>(std::lround(seconds * (1 - part) / part));
  return out + fmt::format("  {}:{:02} left", left / 60, left % 60);
}

ProgressMeter::Style ProgressMeter::choose(bool percent, bool quiet, bool live) {
  if (quiet) return Style::kNone;
  if (percent) return Style::kPercent;
  const bool bar = live && !personality().drop_in && ::isatty(STDERR_FILENO) == 1;
  return bar ? Style::kBar : Style::kNone;
}

ProgressMeter::ProgressMeter(Style style, std::function<ProgressState()> state,
                             std::function<void()> stop)
    : style_(style), state_(std::move(state)), stop_(std::move(stop)), began_(base::Clock::now()) {
  for (const int number : kWatched) {
    struct sigaction action {};
    struct sigaction before {};
    action.sa_handler = &on_signal;
    action.sa_flags = SA_RESTART;
    ::sigaction(number, &action, &before);
    // nohup, and shells' jobs in the background: whoever started us does not want to end us so.
    if (before.sa_handler == SIG_IGN) ::signal(number, SIG_IGN);
  }
  if (style_ == Style::kPercent) print(false);
  printer_.add();
  base::EventLoop::current()->spawn("progress", [this] {
    print_until_ended();
    printer_.done();
  });
}

ProgressMeter::~ProgressMeter() {
  end_.set();
  printer_.wait();
  if (!finished_ && !last_line_.empty()) std::fputs("\n", style_ == Style::kBar ? stderr : stdout);
  std::fflush(stdout);
  for (const int number : kWatched) {
    struct sigaction now {};
    ::sigaction(number, nullptr, &now);
    if (now.sa_handler == &on_signal) ::signal(number, SIG_DFL);
  }
}

void ProgressMeter::print_until_ended() {
  bool stopped = false;
  while (!end_.wait_until(base::Clock::now() + kEvery)) {
    if (print_wanted.exchange(false)) fmt::print(stderr, "{}\n", percent_text(state_()));
    if (!stopped && stop_wanted.load() != 0) {
      stopped = true;
      stop_();
    }
    print(false);
  }
}

void ProgressMeter::print(bool last) {
  if (style_ == Style::kNone) return;
  const ProgressState state = state_();
  const std::chrono::duration<double> seconds = base::Clock::now() - began_;
  std::string line = style_ == Style::kBar ? bar_text(state, seconds.count()) : percent_text(state);
  if (line == last_line_ && !last) return;
  // A shorter line covers what is left of a longer one.
  const size_t width = std::max(line.size(), last_line_.size());
  std::FILE* const to = style_ == Style::kBar ? stderr : stdout;
  if (style_ == Style::kBar) {
    fmt::print(to, "\r{:<{}}", line, width);
  } else {
    fmt::print(to, "{}\r", line);
  }
  std::fflush(to);
  last_line_ = std::move(line);
}

void ProgressMeter::finish() {
  finished_ = true;
  end_.set();
  printer_.wait();
  print(true);
  if (style_ != Style::kNone) std::fputs("\n", style_ == Style::kBar ? stderr : stdout);
}

}  // namespace minivmm::cli
