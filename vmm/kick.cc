// SPDX-License-Identifier: Apache-2.0
#include "vmm/kick.h"

#include <signal.h>

#include <initializer_list>

namespace minivmm::vmm {
namespace {

void on_kick(int) {}

}  // namespace

void install_kick_handler() {
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_handler = on_kick;
    return ::sigaction(SIGRTMIN, &action, nullptr) == 0;
  }();
  (void)installed;
}

void kick_thread(pthread_t thread) noexcept { (void)::pthread_kill(thread, SIGRTMIN); }

ServiceThreadSignals::ServiceThreadSignals() noexcept {
  sigset_t blocked;
  ::sigfillset(&blocked);
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTRAP, SIGRTMIN}) {
    ::sigdelset(&blocked, signal);
  }
  ::pthread_sigmask(SIG_SETMASK, &blocked, &before_);
}

ServiceThreadSignals::~ServiceThreadSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

}  // namespace minivmm::vmm
