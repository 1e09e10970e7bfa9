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
//
// The control socket is served once all is up, and is the first to go down: a command under way is
// waited for, because it may use anything. What its commands ask of the daemon is in
// daemon_commands.cc.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/log.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "block/graph/graph.h"
#include "control/config.h"
#include "control/front_ends.h"
#include "control/guest.h"
#include "control/qmp/server.h"
#include "control/qmp/target.h"
#include "control/readiness.h"
#include "control/signals.h"

namespace minivmm::control {

class Daemon : private qmp::Target {
 public:
  explicit Daemon(Config config);
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;
  ~Daemon() override;

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
  void make_front_ends();
  void bind_control_socket();
  void confine();
  void make_guest();
  bool guest_ended();
  bool restart_guest();
  void warn_of_two_writers() const;
  void announce();
  void run_watched(const std::function<void()>& body);
  void take_signal();
  void begin_end();
  void take_request();
  void wait_for_end();
  // What taking down came to.
  struct Outcome {
    bool idle = true;  // nothing runs any more, all is closed
    std::vector<std::string> problems;
  };
  Outcome take_down();
  void stop_control_socket();
  std::vector<std::string> commands_under_way();
  void close_graph(Outcome& outcome);
  int shut_down();
  [[noreturn]] void give_up_now(const char* why);
  std::vector<std::string> state_lines() const;
  void print_state() const;

  // qmp::Target, on the control socket's loop.
  block::Graph& graph() override { return *graph_; }
  FrontEnds& front_ends() override { return *front_ends_; }
  std::vector<std::string> state() override;
  std::string_view guest_status() override;
  std::vector<std::string> guest_disks() override;
  void stop_guest() override;
  void continue_guest() override;
  void reset_guest() override;
  void quit() override;
  template <typename Body>
  auto with_guest(Body&& body);
  void emit(std::string_view event, qmp::Json data = {});
  GuestEvents guest_events();

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
  std::unique_ptr<FrontEnds> front_ends_;
  std::unique_ptr<SerialPort> serial_port_;
  // Written by the main thread, or by the one that it waits for, under the mutex; others look at it
  // under the mutex.
  std::unique_ptr<Guest> guest_;
  mutable std::mutex guest_mutex_;
  std::shared_ptr<qmp::Server> control_;
  bool restart_failed_ = false;
  base::RateLimit restarts_told_;           // a guest may reset itself all the time
  const char* end_reason_ = "host-signal";  // QMP's word
  base::UniqueFd left_;       // an eventfd: the last NBD client has left, and that is the end
  base::UniqueFd unmounted_;  // an eventfd: somebody else unmounted one of ours
  base::UniqueFd asked_;      // an eventfd: one of these was set by a command
  std::atomic<bool> quit_asked_{false};
  std::atomic<bool> reset_asked_{false};
};

}  // namespace minivmm::control
