// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/session.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace minivmm::nbd {
namespace {

// How long a client that is being disconnected may take to read what is left for it.
constexpr auto kFarewell = std::chrono::seconds(5);
constexpr const char* kServerEnds = "the server ended the session";

// Written by one thread only.
template <typename T>
void bump(std::atomic<T>& counter, T by) noexcept {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace

// The session's fiber waits: from here on replies go out without it, and memory that it does not
// use is others'.
class Session::Pause {
 public:
  explicit Pause(Session& session) noexcept : session_(session) {
    session_.in_batch_ = false;
    session_.replies_.flush();
    session_.account_.set_eager(true);
  }
  ~Pause() {
    session_.in_batch_ = true;
    session_.account_.set_eager(false);
  }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  Session& session_;
};

Session::Session(base::EventLoop& loop, Stream& stream, Resources& resources, Budgets& budgets,
                 const Agreement& agreed, base::CancelSource& cancel, const SessionOptions& options,
                 SessionCounters& counters)
    : loop_(loop),
      stream_(stream),
      resources_(resources),
      agreed_(agreed),
      header_size_(wire::request_size(agreed.headers)),
      cancel_(cancel),
      options_(options),
      counters_(counters),
      account_(budgets, std::min(options.memory, budgets.open().total())),
      input_(resources, budgets.open()),
      commands_(agreed_, resources),
      replies_(loop, stream, resources, *this) {}

const char* Session::run() {
  try {
    serve();
  } catch (const std::bad_alloc&) {
    outcome_ = "there is no memory for it";
  }
  finish();
  return outcome_;
}

void Session::end(const char* why) noexcept {
  ended_ = true;
  outcome_ = why;
}

void Session::serve() {
  in_batch_ = true;
  while (!ended_) {
    while (input_.size() >= header_size_) {
      if (!take_request()) return;
      if (send_is_due()) send_replies();
      if (++taken_ >= kRequestsPerTurn && !take_turn()) return;
    }
    if (!receive()) return;
  }
}

void Session::finish() noexcept {
  in_batch_ = false;
  account_.set_eager(true);
  replies_.flush();
  while (in_flight_ > 0) drained_.wait("requests to end");
  // A client that does not read its last replies is not waited for.
  base::Timer timer([](void* stream) noexcept { static_cast<Stream*>(stream)->shutdown(); },
                    &stream_);
  loop_.timers().arm(timer, base::Clock::now() + kFarewell);
  replies_.wait_empty();
  loop_.timers().disarm(timer);
}

RequestRules Session::rules() const noexcept {
  return {agreed_.target->size(), agreed_.target->writable(), agreed_.headers,
          !agreed_.contexts.empty()};
}

// --- requests ---

// Takes the request at the front of the input and starts it, with those that can be merged with
// it. False: the session ends.
bool Session::take_request() {
  const auto head = wire::decode_request(input_.data(), agreed_.headers);
  if (!head) {
    end("it sent a request without its magic");
    return false;
  }
  input_.consume(header_size_);
  if (head->type == static_cast<uint16_t>(wire::Command::kDisc)) {
    end("it disconnected");
    return false;
  }
  if (head->type == static_cast<uint16_t>(wire::Command::kBlockStatus) && head->payload > 0) {
    return take_status_query(*head);
  }
  if (const auto refusal = refuse(*head, rules())) return take_refused(*head, *refusal);
  if (agreed_.target->withdrawn()) {
    return take_refused(*head, {wire::ErrorCode::kShutdown, "the export was withdrawn"});
  }
  const bool is_write = head->type == static_cast<uint16_t>(wire::Command::kWrite);
  const bool is_read = head->type == static_cast<uint16_t>(wire::Command::kRead);
  // A write that is here completely is written from where it lies.
  const bool own_buffer = is_read || (is_write && input_.size() < head->length);
  Admitted request = admit(*head, own_buffer ? head->length : 0);
  if (!request || (is_write && !take_payload(*request))) return false;
  if (is_read || is_write) extend_group(*request);
  start(*request.release());
  return true;
}

bool Session::take_refused(const wire::Request& head, const Refusal& refusal) {
  if (head.payload > 0) {
    // Who uses extended headers knows the largest payload.
    const uint64_t patience = agreed_.extended() ? 1 : 2;
    if (head.payload > patience * wire::kMaxPayload) {
      end("it announced far too large a payload");
      return false;
    }
    if (!skip_payload(head.payload)) return false;
  }
  Admitted request = admit(head, 0);
  if (!request) return false;
  answer_refused(*request.release(), refusal);
  return true;
}

// As a mask; 0 for an id that was not agreed on.
uint32_t Session::context_of(uint32_t id) const noexcept {
  const auto& all = agreed_.contexts;
  const auto found =
      std::find_if(all.begin(), all.end(), [id](auto& each) { return each.id == id; });
  return found == all.end() ? 0 : uint32_t{1} << (found - all.begin());
}

// A BLOCK_STATUS that names contexts.
bool Session::take_status_query(const wire::Request& head) {
  const size_t most = wire::kStatusQuerySize + 4 * kMostContexts;
  if (!agreed_.extended() || head.payload > most) {
    return take_refused(head, {wire::ErrorCode::kInval, "more contexts than were agreed on"});
  }
  Admitted request = admit(head, head.payload);
  if (!request || !take_payload(*request)) return false;
  Request& query = *request.release();
  const auto decoded = wire::decode_status_query({query.payload, query.head.payload});
  std::optional<Refusal> refusal;
  if (!decoded) {
    refusal = {wire::ErrorCode::kInval, "not a list of contexts"};
  } else {
    query.head.length = decoded->length;
    query.contexts = 0;
    for (size_t i = 0; i < decoded->count && !refusal; ++i) {
      const uint32_t one = context_of(decoded->id(i));
      const bool valid = one != 0 && (one & query.contexts) == 0;
      if (!valid) refusal = {wire::ErrorCode::kInval, "a context that was not agreed on, or twice"};
      query.contexts |= one;
    }
    if (!refusal) refusal = refuse(query.head, rules());
  }
  if (refusal) {
    answer_refused(query, *refusal);
  } else {
    start(query);
  }
  return true;
}

void Session::answer_refused(Request& request, const Refusal& refusal) noexcept {
  bump(counters_.errors, uint64_t{1});
  if (request.block != nullptr) {
    input_.release(*request.block);
    request.block = nullptr;
  }
  commands_.fail(request, refusal.error, refusal.reason);
  replies_.push(request);
}

// A request object whose memory is accounted for. Null: the session ends.
Session::Admitted Session::admit(const wire::Request& head, uint64_t payload) {
  const uint64_t charge = payload + kOverhead;
  if ((holds_too_much(charge) || !account_.try_take(charge)) && !wait_for_memory(charge))
    return {nullptr, Dropper{this}};
  return make_request(head, charge);
}

// `charge` was taken from the account.
Session::Admitted Session::make_request(const wire::Request& head, uint64_t charge) {
  try {
    Request& out = resources_.take_request();
    out.head = head;
    out.contexts = agreed_.every_context();
    out.charge = charge;
    if (charge > kLargeRequest) large_ += charge;
    bump(counters_.requests, uint64_t{1});
    return {&out, Dropper{this}};
  } catch (...) {
    account_.give_back(charge);
    throw;
  }
}

// It has to see replies on their way first. A client that does not read gets, while it does not, a
// part of what is free that shrinks with the number of such clients: they leave room for those who
// read.
bool Session::holds_too_much(uint64_t bytes) noexcept {
  if (account_.used() == 0) return false;
  if (bytes > kLargeRequest && large_ > 0 && large_ + bytes > kMostLarge) return true;
  if (!replies_.blocked()) return false;
  return account_.used() + bytes > std::max(kUnread, account_.budgets().open().spare() / 2);
}

bool Session::wait_for_memory(uint64_t bytes) {
  const Pause pause(*this);
  input_.park();
  while (!cancel_.cancelled()) {
    if (holds_too_much(bytes)) {
      memory_.wait("the client to read its replies");
      continue;
    }
    if (account_.try_take(bytes)) return true;
    if (account_.within_limit(bytes)) return account_.wait(bytes, cancel_);
    memory_.wait("the client to read its replies");
  }
  return false;
}

// --- payloads of writes ---

bool Session::take_payload(Request& request) {
  const size_t length = request.head.payload;
  if (length == 0) return true;
  const size_t have = std::min(length, input_.size());
  large_mode_ = length > kLargePayload;
  if (have == length) {
    // SAFETY: the block is received into only behind this payload.
    request.payload = const_cast<std::byte*>(input_.data());
    request.block = &input_.pin();
    input_.consume(length);
    return true;
  }
  request.buffer = resources_.buffers().take(length);
  request.payload = request.buffer.data();
  if (have > 0) std::memcpy(request.payload, input_.data(), have);
  input_.consume(have);
  return receive_payload(request, have);
}

// What comes behind the payload is received with it.
bool Session::receive_payload(Request& request, size_t have) {
  Progress progress;
  std::span<std::byte> rest(request.payload + have, request.head.payload - have);
  while (!rest.empty()) {
    iovec parts[2] = {{rest.data(), rest.size()},
                      input_.room(large_mode_ ? header_size_ : SIZE_MAX)};
    size_t n = 0;
    const size_t count = parts[1].iov_len > 0 ? 2 : 1;
    if (!receive_into({parts, count}, n, &progress)) return false;
    const size_t mine = std::min(n, rest.size());
    rest = rest.subspan(mine);
    if (n > mine) input_.received(n - mine);
  }
  return true;
}

bool Session::skip_payload(uint64_t length) {
  const uint64_t have = std::min<uint64_t>(length, input_.size());
  input_.consume(have);
  length -= have;
  while (length > 0) {
    iovec room = input_.room(static_cast<size_t>(std::min<uint64_t>(length, SIZE_MAX)));
    std::byte sink[512];
    if (room.iov_len == 0) room = {sink, std::min<size_t>(sizeof sink, length)};
    size_t n = 0;
    if (!receive_into({&room, 1}, n)) return false;
    length -= n;
  }
  return true;
}

// --- merging ---

// Takes the requests behind `first` for as long as each continues where the last one ended.
void Session::extend_group(Request& first) noexcept {
  if (first.head.length == 0 || first.head.length > kMaxMerged) return;
  Request* last = &first;
  try {
    for (size_t n = 1; n < kMaxGroup; ++n) {
      Request* const next = take_adjacent(*last, first);
      if (next == nullptr) return;
      last->next = next;
      last = next;
    }
  } catch (const std::bad_alloc&) {
    // The request that was looked at is still in the input: its turn comes.
  }
}

Request* Session::take_adjacent(const Request& last, const Request& first) {
  if (input_.size() < header_size_) return nullptr;
  const auto head = wire::decode_request(input_.data(), agreed_.headers);
  if (!head || head->type != first.head.type || head->flags != first.head.flags ||
      head->offset != last.end() || head->length == 0 || head->length > kMaxMerged ||
      refuse(*head, rules())) {
    return nullptr;
  }
  const bool is_write = first.command() == wire::Command::kWrite;
  if (is_write && input_.size() < header_size_ + head->length) return nullptr;
  const uint64_t charge = kOverhead + (is_write ? 0 : head->length);
  if (holds_too_much(charge) || !account_.try_take(charge)) return nullptr;
  Request* const out = make_request(*head, charge).release();
  input_.consume(header_size_);
  if (is_write) (void)take_payload(*out);  // lies in the input: it neither waits nor allocates
  return out;
}

// --- running ---

void Session::start(Request& first) noexcept {
  for (const Request* r = &first; r != nullptr; r = r->next) {
    ++in_flight_;
    written_ += r->head.payload;
  }
  counters_.in_flight.store(in_flight_, std::memory_order_relaxed);
  try {
    loop_.spawn_now("nbd request", [this, &first] { finish_group(first, commands_.run(first)); });
  } catch (const std::bad_alloc&) {
    for (Request* r = &first; r != nullptr; r = r->next) {
      commands_.fail(*r, wire::ErrorCode::kNoMem, "no memory for a stack");
    }
    finish_group(first, 1);
  }
}

void Session::finish_group(Request& first, unsigned failed) noexcept {
  if (failed > 0) bump(counters_.errors, uint64_t{failed});
  for (Request* r = &first; r != nullptr;) {
    Request* const next = r->next;
    --in_flight_;
    if (r->block != nullptr) {
      input_.release(*r->block);
      r->block = nullptr;
      memory_.notify();
    }
    replies_.push(*r);
    r = next;
  }
  counters_.in_flight.store(in_flight_, std::memory_order_relaxed);
  if (!in_batch_) {
    replies_.flush_soon();
    if (in_flight_ == 0) drained_.notify();
  }
}

void Session::on_sent(Request& request) noexcept {
  if (request.charge > kLargeRequest) large_ -= request.charge;
  account_.give_back(request.charge);
  resources_.give_back(request);
  memory_.notify();
}

bool Session::on_stall(std::chrono::nanoseconds stalled) noexcept {
  return stalled >= options_.stall_limit && account_.budgets().contended();
}

// --- receiving ---

// A client that always has more to say keeps neither others from the loop nor the loop from ending
// its session.
bool Session::take_turn() {
  if (receives_ >= kReceivesPerTurn || taken_ >= kRequestsPerTurn) {
    receives_ = 0;
    taken_ = 0;
    loop_.yield();
  }
  if (!cancel_.cancelled()) return true;
  end(kServerEnds);
  return false;
}

bool Session::receive() {
  send_replies();
  pace_.receives(counters_.requests.load(std::memory_order_relaxed));
  ++receives_;
  if (!take_turn()) return false;
  for (;;) {
    iovec room = input_.room(large_mode_ ? header_size_ - input_.size() : SIZE_MAX);
    large_mode_ = false;
    if (room.iov_len == 0) {
      // Every block is held by writes that run.
      const Pause pause(*this);
      memory_.wait("writes to end");
      if (cancel_.cancelled()) return false;
      continue;
    }
    size_t n = 0;
    const int64_t tried = try_receive({&room, 1});
    if (tried == -EAGAIN) {
      input_.idle();
      if (!wait_readable()) return false;
      continue;
    }
    if (tried <= 0) return false;
    n = static_cast<size_t>(tried);
    input_.received(n);
    note_receive();
    return true;
  }
}

int64_t Session::try_receive(std::span<iovec> to) noexcept {
  const int64_t n = stream_.try_receive(to);
  if (n == -EAGAIN) pace_.waits();
  return n;
}

void Session::send_replies() noexcept {
  written_ = 0;
  if (replies_.gathered() == 0) return;
  pace_.sends(replies_.gathered());
  replies_.flush();
}

void Session::note_receive() noexcept {
  if (!resources_.served_before(*this)) {
    alone_ = 0;
  } else if (alone_ < kAloneReceives) {
    ++alone_;
  }
}

// Receives at least a byte into buffers that stay. False: the session ends.
bool Session::receive_into(std::span<iovec> to, size_t& received, Progress* progress) {
  for (;;) {
    const int64_t n = try_receive(to);
    if (n > 0) {
      received = static_cast<size_t>(n);
      if (progress != nullptr) progress->bytes += received;
      return take_turn();
    }
    if (n != -EAGAIN || !wait_readable(progress)) return false;
  }
}

bool Session::stalls(const Progress& progress, base::Clock::time_point now) noexcept {
  return now - progress.since >= options_.stall_limit && account_.budgets().contended();
}

bool Session::wait_readable(Progress* progress) {
  using std::chrono::milliseconds;
  const auto tick = std::clamp(options_.stall_limit, milliseconds(10), milliseconds(1000));
  const Pause pause(*this);
  receives_ = 0;
  auto now = base::Clock::now();
  auto silent_since = now;
  if (progress != nullptr && progress->bytes >= kLeastProgress) *progress = {now, 0};
  for (;;) {
    std::optional<base::Clock::time_point> deadline;
    if (options_.idle_limit.count() > 0) deadline = silent_since + options_.idle_limit;
    if (progress != nullptr) {
      if (stalls(*progress, now)) {
        end("it announced data and did not send them, while others waited for the memory");
        return false;
      }
      deadline = deadline ? std::min(*deadline, now + tick) : now + tick;
    }
    const auto result = stream_.wait_readable(&cancel_, deadline);
    if (result == Stream::Wait::kReady) return true;
    if (result == Stream::Wait::kCancelled) {
      end(kServerEnds);
      return false;
    }
    now = base::Clock::now();
    if (in_flight_ > 0) {
      silent_since = now;
    } else if (options_.idle_limit.count() > 0 && now - silent_since >= options_.idle_limit) {
      end("it was silent for too long");
      return false;
    }
  }
}

}  // namespace minivmm::nbd
