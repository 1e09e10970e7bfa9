// SPDX-License-Identifier: Apache-2.0
#include "vmm/terminal.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <atomic>

#include <termios.h>

#include "base/error.h"

namespace minivmm::vmm {
namespace {

constexpr std::array kCrashSignals = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

// What a signal handler needs: plain data, written before the flag is set.
termios saved_settings;
int saved_fd = -1;
std::atomic<bool> is_raw{false};
std::array<struct sigaction, kCrashSignals.size()> saved_actions;

}  // namespace

// Async-signal-safe. With SIGTTOU blocked a job in the background may set the terminal, too; else
// it would be stopped here.
void restore_terminal() noexcept {
  if (!is_raw.exchange(false)) return;
  sigset_t blocked;
  sigset_t before;
  ::sigemptyset(&blocked);
  ::sigaddset(&blocked, SIGTTOU);
  ::pthread_sigmask(SIG_BLOCK, &blocked, &before);
  ::tcsetattr(saved_fd, TCSANOW, &saved_settings);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

namespace {

// Gives the terminal back and lets the crash go on to whoever had the signal before.
void on_crash(int signal) {
  restore_terminal();
  for (size_t i = 0; i < kCrashSignals.size(); ++i) {
    if (kCrashSignals[i] == signal) ::sigaction(signal, &saved_actions[i], nullptr);
  }
  ::raise(signal);
}

void install_crash_handlers() {
  struct sigaction action {};
  action.sa_handler = on_crash;
  action.sa_flags = SA_NODEFER;
  for (size_t i = 0; i < kCrashSignals.size(); ++i) {
    ::sigaction(kCrashSignals[i], &action, &saved_actions[i]);
  }
}

}  // namespace

RawTerminal::RawTerminal(int fd) {
  if (fd < 0 || ::isatty(fd) == 0) return;
  // Started in the background: the terminal belongs to somebody else.
  const pid_t foreground = ::tcgetpgrp(fd);
  if (foreground >= 0 && foreground != ::getpgrp()) return;
  if (is_raw.load()) throw base::Error(EBUSY, "terminal: another machine already uses it");
  if (::tcgetattr(fd, &saved_settings) != 0) {
    throw base::errno_error(errno, "terminal: cannot read its settings");
  }
  saved_fd = fd;
  static const bool registered = ::atexit(restore_terminal) == 0;
  (void)registered;
  termios raw = saved_settings;
  // Output processing stays, so that our own log lines do not run down the screen like stairs.
  raw.c_iflag &=
      ~static_cast<tcflag_t>(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
  raw.c_lflag &= ~static_cast<tcflag_t>(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
  raw.c_cc[VMIN] = 1;
  raw.c_cc[VTIME] = 0;
  is_raw.store(true);
  install_crash_handlers();
  if (::tcsetattr(fd, TCSANOW, &raw) != 0) {
    const int err = errno;
    restore_terminal();
    throw base::errno_error(err, "terminal: cannot set raw mode");
  }
  active_ = true;
}

RawTerminal::~RawTerminal() {
  if (!active_) return;
  restore_terminal();
  for (size_t i = 0; i < kCrashSignals.size(); ++i) {
    ::sigaction(kCrashSignals[i], &saved_actions[i], nullptr);
  }
}

}  // namespace minivmm::vmm
