// SPDX-License-Identifier: Apache-2.0
// The transmission phase of one connection: receives requests, runs each as a fiber, sends the
// replies. On the connection's loop; run() is the connection's own fiber.
//
// The path of a small request is short: one receive brings many; each is started at once, and one
// whose data is in memory ends right there; adjacent ones become one; when what was received is
// used up, all replies leave in one call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "nbd-server/budget.h"
#include "nbd-server/commands.h"
#include "nbd-server/input.h"
#include "nbd-server/local_wait.h"
#include "nbd-server/negotiation.h"
#include "nbd-server/placement.h"
#include "nbd-server/reply_queue.h"
#include "nbd-server/send_pace.h"
#include "nbd-server/stream.h"
#include "nbd-server/validation.h"

namespace minivmm::nbd {

// For state dumps; written by the session's loop, read by any thread.
struct SessionCounters {
  std::atomic<uint64_t> requests{0};
  std::atomic<uint64_t> errors{0};
  std::atomic<uint32_t> in_flight{0};
};

struct SessionOptions {
  std::chrono::milliseconds idle_limit{0};
  std::chrono::milliseconds stall_limit{0};
  uint64_t memory = 0;
};

class Session final : private ReplyQueue::Owner {
 public:
  Session(base::EventLoop& loop, Stream& stream, Resources& resources, Budgets& budgets,
          const Agreement& agreed, base::CancelSource& cancel, const SessionOptions& options,
          SessionCounters& counters, Placement& placement);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Serves until the client leaves or breaks the protocol. When `cancel` fires, until nothing is in
  // flight any more: what comes meanwhile is refused with ESHUTDOWN. Every request has ended when
  // this returns. The text says why, for the log; nullptr: it is to go on on the other loop of
  // `placement`, by another session, and nothing is in hand.
  const char* run();

  // After `cancel` has fired: wakes what waits for the client to read.
  void on_cancel() noexcept { memory_.notify(); }

 private:
  // What a client that does not read its replies may hold in any case.
  static constexpr uint64_t kUnread = 32 << 10;
  // Nor may it have more requests in hand, whose objects stay when their memory goes. Those who
  // asked for up to twice as much at once, before that was known, can be without their memory;
  // others keep it until they take their replies, or are cut off.
  static constexpr size_t kMostUnread = 64;
  // What a request costs beside its payload: its objects, and a stack when it must wait.
  static constexpr uint64_t kOverhead = 16 << 10;
  // Replies are sent when so much has gathered (see also send_pace.h), though more requests wait:
  // while the data is still in the processor's cache, and so that the client works on them while
  // the next are read. What a client that has the loop to itself wrote counts, too, though its
  // replies are short.
  static constexpr size_t kSendBatch = 256 << 10;
  // While the loop serves other connections between, no client takes turns with the server, and
  // fewer calls win (measured with four connections: a fifth more writes).
  static constexpr size_t kSendRepliesShared = 32;
  // Payloads up to this take part in merging.
  static constexpr uint32_t kMaxMerged = 32 << 10;
  // So often in a row may input be there already, or so many requests be taken, before the loop's
  // other fibers get their turn.
  static constexpr unsigned kReceivesPerTurn = 8;
  static constexpr unsigned kRequestsPerTurn = 256;
  // A session that received so often in a row, whatever the turns, has the loop to itself.
  static constexpr unsigned kAloneReceives = 2 * kReceivesPerTurn;
  // So much of a payload has to come within the stall limit while others wait for memory.
  static constexpr size_t kLeastProgress = 512 << 10;
  // After a WRITE of more than this, only the next header is received with its payload: the data
  // behind that goes straight to its own buffer.
  static constexpr uint32_t kLargePayload = 64 << 10;
  // Of requests above the one, a client has only so much in hand, or one. Each keeps a disk busy by
  // itself; what is read ahead of the socket only falls out of the processor's cache before it is
  // sent, and needs memory that the pool of buffers does not have (measured with eight of 4 MiB, of
  // which each began when it came: a quarter of the rate, half of it for page faults).
  static constexpr uint64_t kLargeRequest = uint64_t{1} << 20;
  static constexpr uint64_t kMostLarge = uint64_t{9} << 20;

  class Pause;

  void serve();
  bool take_request();
  bool take_refused(const wire::Request& head, const Refusal& refusal);
  bool take_status_query(const wire::Request& head);
  uint32_t context_of(uint32_t id) const noexcept;
  // Gives a request up that was not started.
  struct Dropper {
    Session* session;
    void operator()(Request* request) const noexcept { session->on_sent(*request); }
  };
  using Admitted = std::unique_ptr<Request, Dropper>;
  Admitted admit(const wire::Request& head, uint64_t payload);
  Admitted make_request(const wire::Request& head, uint64_t charge);
  bool wait_for_memory(uint64_t bytes);
  bool holds_too_much(uint64_t bytes) noexcept;
  void answer_refused(Request& request, const Refusal& refusal) noexcept;
  bool take_payload(Request& request);
  bool receive_payload(Request& request, size_t have);
  bool skip_payload(uint64_t length);
  void extend_group(Request& first) noexcept;
  Request* take_adjacent(const Request& last, const Request& first);
  void start(Request& all) noexcept;
  Request* answer_borrowed(Request* first) noexcept;
  void finish_group(Request& first, unsigned failed) noexcept;

  // How a payload comes in whose memory is set aside already.
  struct Progress {
    base::Clock::time_point since{};
    size_t bytes = kLeastProgress;  // since then
  };
  bool receive();
  bool leaves(bool alternating) noexcept;
  int64_t try_receive(std::span<iovec> to) noexcept;
  bool take_turn();
  bool receive_into(std::span<iovec> to, size_t& received, Progress* progress = nullptr);
  bool wait_readable(Progress* progress = nullptr);
  bool stalls(const Progress& progress, base::Clock::time_point now) noexcept;
  void note_receive() noexcept;
  void send_replies() noexcept;
  bool send_is_due() const noexcept {
    const bool alone = alone_ >= kAloneReceives;
    return replies_.gathered() >= (alone ? pace_.replies() : kSendRepliesShared) ||
           replies_.gathered_bytes() + (alone ? written_ : 0) >= kSendBatch;
  }
  void finish() noexcept;
  RequestRules rules() const noexcept;
  void end(const char* why) noexcept;
  // Whether the server has begun to end the session, or the export.
  bool ending() const noexcept { return refusing_ || agreed_.target->withdrawn(); }
  // Whether the session ends now, because the server wants it.
  bool is_over() noexcept;
  // Ends waits whose outcome is_over() then tells.
  base::CancelSource& until_over() noexcept { return refusing_ ? idle_ : cancel_; }

  void on_sent(Request& request) noexcept override;
  bool on_stall(std::chrono::nanoseconds stalled) noexcept override;
  bool memory_is_wanted() const noexcept override {
    return in_hand() <= 2 * kMostUnread && account_.budgets().contended();
  }
  size_t in_hand() const noexcept { return in_flight_ + replies_.gathered(); }
  bool on_shed(Request& request, bool begun) noexcept override;
  bool on_borrow(Request& request) noexcept override { return commands_.borrow(request); }
  bool on_restore(Request& request, bool begun) noexcept override;
  void give_back_charge(const Request& request) noexcept;

  base::EventLoop& loop_;
  Stream& stream_;
  Resources& resources_;
  const Agreement& agreed_;
  const size_t header_size_;  // of a request
  base::CancelSource& cancel_;
  const SessionOptions options_;
  SessionCounters& counters_;
  Placement& placement_;

  Account account_;
  Input input_;
  Commands commands_;
  ReplyQueue replies_;
  LocalWait memory_;   // the client's own replies have to be sent first
  LocalWait drained_;  // in_flight_ is 0
  uint32_t in_flight_ = 0;
  bool waited_ = false;      // for the client, in this receive
  bool small_ = false;       // the last request was
  bool in_batch_ = false;    // run() is working: it will flush
  bool large_mode_ = false;  // see kLargePayload
  bool ended_ = false;
  bool refusing_ = false;        // cancel_ has fired
  base::CancelSource idle_;      // fires when, after that, nothing is in flight
  base::CancelSource given_up_;  // fires when replies at the end are not waited for any longer
  unsigned receives_ = 0;        // in this turn
  unsigned taken_ = 0;           // requests, in this turn
  uint64_t large_ = 0;           // what requests above kLargeRequest were charged
  // Receives since another session of the loop received, as far as they count.
  unsigned alone_ = kAloneReceives;
  SendPace pace_;
  uint64_t written_ = 0;  // payloads taken since the last send
  const char* outcome_ = "it disconnected";
};

}  // namespace minivmm::nbd
