// SPDX-License-Identifier: Apache-2.0
// One control client from its greeting to its end: reads messages, runs their commands one after
// the other, answers in that order. Nothing is read while a command runs or while an answer has not
// left, so what a client can make us hold is bounded; events for one that does not read wait up to
// a limit, and then it is cut off, as is one that takes none of an answer for a while.
//
// Owned by the server's list and by the fiber that runs it; everything is on one loop.
#pragma once

#include <string>
#include <string_view>

#include <chrono>
#include <mutex>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "base/wait_queue.h"
#include "control/qmp/json.h"
#include "control/qmp/splitter.h"

namespace minivmm::control::qmp {

class Target;

struct SessionLimits {
  size_t waiting_bytes = size_t{1} << 20;      // of events that are not read
  std::chrono::milliseconds stall{30'000};     // an answer that does not get on
  std::chrono::milliseconds last_words{1000};  // what an end waits for a client to read
};

class Session {
 public:
  Session(base::EventLoop& loop, base::UniqueFd connected, Target& target,
          const SessionLimits& limits);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Serves the client until it leaves, is cut off, or end() was called. Its fiber.
  void run();
  // A line for a client that has negotiated. The loop's thread; does not wait.
  void send_event(const std::string& line);
  // No more commands: run() returns once the one under way is answered. The loop's thread.
  void end();
  // The command under way; empty: none.
  const std::string& running() const noexcept { return running_; }

 private:
  void receive_and_answer();
  bool receive();
  void answer_waiting();
  std::string answer(const MessageSplitter::Piece& piece);
  Json execute(const std::string& command, Json arguments);
  void send(std::string_view line);
  void write_out();
  bool write_some();
  bool drain(base::Clock::time_point deadline);
  bool wait_writable(base::Clock::time_point deadline);
  void cut() noexcept;

  base::EventLoop& loop_;
  const base::UniqueFd fd_;
  Target& target_;
  const SessionLimits limits_;
  MessageSplitter splitter_;
  std::string input_;
  bool negotiated_ = false;
  bool ending_ = false;
  std::string running_;
  base::CancelSource reading_;

  std::string output_;    // not yet taken by the socket
  bool writing_ = false;  // a fiber is at it
  bool broken_ = false;   // the client is gone or was cut off
  std::mutex mutex_;      // for the queue
  base::WaitQueue written_;
};

}  // namespace minivmm::control::qmp
