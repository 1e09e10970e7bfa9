// SPDX-License-Identifier: Apache-2.0
// One run of `minivmm boot` or `minivmm serve`: builds the graph, opens the front ends, waits for
// an end, and takes everything down in order.
//
// Order up: loops, graph, guest's devices, FUSE, NBD, guest. If one part cannot start, those before
// it are taken down again. Order down: stop accepting and drain the front ends, all at once so that
// one that hangs costs the others nothing, close the graph (which flushes), stop the loops.
//
// Whatever may wait for a device runs on a thread of its own, up and down, while the main thread
// watches for signals and the time: a device that hangs cannot make the process deaf.
#pragma once

#include <string>

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "block/graph/graph.h"
#include "control/config.h"
#include "control/guest.h"
#include "control/readiness.h"
#include "control/signals.h"
#include "fuse/mount.h"
#include "nbd-server/server.h"

namespace minivmm::control {

class Daemon {
 public:
  explicit Daemon(Config config);
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;
  ~Daemon();

  // Brings everything up, says where it is on stderr, waits for the guest's end or a signal, takes
  // everything down. Returns the process's exit status: the guest's, or 0; 1 if something could
  // not be flushed. Throws what prevented the start; then nothing is left running. Ends the process
  // itself (status 1) where requests hang beyond the shutdown timeout, or a second SIGINT or
  // SIGTERM comes.
  int run();

 private:
  template <typename Body>
  void on_loop(const char* name, Body&& body) {
    loops_->loop(0).call(name, std::forward<Body>(body));
  }
  void start();
  void open_nodes();
  void make_nbd();
  void open_nbd();
  bool serve_connected(const NbdListener& wanted);
  void confine();
  void open_fuse();
  void publish(const Export& wanted);
  void make_guest();
  bool restart_guest();
  void warn_of_two_writers() const;
  void announce();
  void run_watched(const std::function<void()>& body);
  void take_signal();
  void begin_end();
  void wait_for_end();
  // What taking down came to.
  struct Outcome {
    bool idle = true;  // nothing runs any more, all is closed
    std::vector<std::string> problems;
  };
  Outcome take_down();
  void close_graph(Outcome& outcome);
  int shut_down();
  [[noreturn]] void give_up_now(const char* why);
  void print_state() const;

  const Config config_;
  SignalFd signals_;
  PidFile pid_file_;
  // Main thread only.
  bool started_ = false;    // start() has ended, well or not: the parts below stand still
  bool ending_ = false;     // an end was asked for, or has begun
  unsigned insistent_ = 0;  // SIGINT and SIGTERM so far
  std::chrono::steady_clock::time_point give_up_{};  // once ending_
  // Destroyed from the last to the first: each may use those before it.
  std::unique_ptr<base::LoopGroup> loops_;
  std::unique_ptr<block::Graph> graph_;
  std::unique_ptr<nbd::Server> nbd_;
  std::vector<std::unique_ptr<fuse::Mount>> mounts_;
  std::unique_ptr<SerialPort> serial_port_;
  std::unique_ptr<Guest> guest_;
  bool restart_failed_ = false;
  base::UniqueFd left_;       // an eventfd: the last NBD client has left, and that is the end
  base::UniqueFd unmounted_;  // an eventfd: somebody else unmounted one of ours
};

}  // namespace minivmm::control
