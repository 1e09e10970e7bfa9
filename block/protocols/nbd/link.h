// SPDX-License-Identifier: Apache-2.0
// One connection to an NBD server: a libnbd handle that a fiber of one loop drives. Commands may
// come from every loop; those of others hop.
//
// Shared by the node and by its driving fiber, which ends when the connection does. A connection
// that broke stays broken: the node makes another.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "base/timer_queue.h"
#include "base/unique_fd.h"
#include "block/protocols/nbd/command.h"
#include "block/protocols/nbd/libnbd.h"
#include "block/protocols/nbd/target.h"

namespace minivmm::block {

// What the server says of the export.
struct NbdExport {
  uint64_t size = 0;
  uint32_t minimum_block = 0;  // 0: not told
  uint32_t preferred_block = 0;
  uint32_t maximum_block = 0;
  bool read_only = false;
  bool flush = false;
  bool fua = false;
  bool trim = false;
  bool zero = false;
  bool fast_zero = false;
  bool cache = false;
  bool multi_conn = false;
  bool allocation = false;  // tells of holes
  bool tls = false;
  std::string protocol;
};

class NbdLink final : public std::enable_shared_from_this<NbdLink> {
 public:
  // What run() returns when the connection broke before the command was answered.
  static constexpr int kLost = -1;

  // Fiber. Connects to the target, on the present loop, until the deadline or until `*stop`. Throws
  // what the server or the system said.
  static std::shared_ptr<NbdLink> connect(const NbdTarget& target, base::Clock::time_point deadline,
                                          const std::atomic<bool>& stop);
  ~NbdLink();
  NbdLink(const NbdLink&) = delete;
  NbdLink& operator=(const NbdLink&) = delete;

  const NbdExport& info() const noexcept { return info_; }
  base::EventLoop& home() const noexcept { return home_; }
  // In flight now. Any thread.
  uint32_t load() const noexcept { return in_flight_.load(std::memory_order_relaxed); }
  // Answers that have come so far. Any thread.
  uint64_t answers() const noexcept { return completed_.load(std::memory_order_relaxed); }

  // Fiber of any loop. 0, kLost, or the errno value of the server's answer. The command's data
  // stay in use until this returns.
  int run(NbdCommand& command);

  // Called by the driving fiber when the connection has ended. Set on the home loop right after
  // connect(), before anything else runs there.
  using Ended = std::function<void(const std::shared_ptr<NbdLink>& link)>;
  void when_ended(Ended call) { when_ended_ = std::move(call); }

  // Any thread: breaks the connection. Commands in flight are lost.
  void cut() noexcept;
  // Fiber of any loop: takes leave and returns when the connection has ended, which is forced at
  // the deadline; false: it was. Every answer that came has been taken by then. One fiber at a
  // time.
  bool close(base::Clock::time_point deadline);

 private:
  struct Waiting;
  NbdLink(base::EventLoop& home, const Libnbd& library, std::chrono::seconds patience);

  void configure(const NbdTarget& target);
  void handshake(const NbdTarget& target, base::Clock::time_point deadline,
                 const std::atomic<bool>& stop);
  void take_socket();
  void learn();
  [[noreturn]] void fail(const NbdTarget& target) const;
  bool over() const noexcept;

  int run_here(NbdCommand& command);
  int64_t issue(NbdCommand& command, Waiting& waiting) noexcept;
  void drive();
  void advance(int64_t ready) noexcept;
  bool more_has_come() const noexcept;
  bool leave(base::Clock::time_point deadline);
  void watch_answers() noexcept;
  static void look_for_answers(void* link) noexcept;

  base::EventLoop& home_;
  const Libnbd& nbd_;
  nbd_handle* handle_ = nullptr;
  NbdExport info_;
  base::UniqueFd socket_;  // our own descriptor of libnbd's socket; from the handshake on
  std::atomic<uint32_t> in_flight_{0};
  std::atomic<uint64_t> completed_{0};  // written by the home loop's thread only

  // The home loop's thread only.
  const std::chrono::seconds patience_;  // with a server that answers nothing; zero: for ever
  base::Timer silence_;                  // armed while commands are in flight
  uint64_t completed_before_ = 0;        // when it was armed
  base::CancelSource* poll_ = nullptr;   // ends the present wait of drive()
  bool watches_write_ = false;
  base::Fiber* leaving_ = nullptr;  // waits for the end of drive()
  bool ended_ = false;
  Ended when_ended_;
};

}  // namespace minivmm::block
