// SPDX-License-Identifier: Apache-2.0
// Getting a thread of ours out of a system call: a real-time signal with an empty handler and no
// SA_RESTART, so that the call returns EINTR.
#pragma once

#include <pthread.h>
#include <signal.h>

namespace minivmm::vmm {

// Once per process; again: no effect. Any thread.
void install_kick_handler();
// `thread` must not have been joined. Any thread.
void kick_thread(pthread_t thread) noexcept;

// While it lives, the calling thread blocks every signal except the kick and those a fault raises,
// and threads it makes inherit that: SIGINT and SIGTERM stay with the program's own threads.
class ServiceThreadSignals {
 public:
  ServiceThreadSignals() noexcept;
  ~ServiceThreadSignals();
  ServiceThreadSignals(const ServiceThreadSignals&) = delete;
  ServiceThreadSignals& operator=(const ServiceThreadSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace minivmm::vmm
