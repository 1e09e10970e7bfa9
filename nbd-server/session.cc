// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/session.h"

#include <algorithm>
#include <cerrno>

namespace minivmm::nbd {
namespace {

// How long a client that is being disconnected may take to read what is left for it.
constexpr auto kFarewell = std::chrono::seconds(5);

constexpr Refusal kEnding{wire::ErrorCode::kShutdown, "the server is ending the session"};

// Written by one thread only.
template <typename T>
void bump(std::atomic<T>& counter, T by) noexcept {
  counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
}

}  // namespace

Session::Session(base::EventLoop& loop, Stream& stream, Resources& resources, Budgets& budgets,
                 const Agreement& agreed, base::CancelSource& cancel, const SessionOptions& options,
                 SessionCounters& counters, Placement& placement)
    : loop_(loop),
      stream_(stream),
      resources_(resources),
      agreed_(agreed),
      header_size_(wire::request_size(agreed.headers)),
      cancel_(cancel),
      options_(options),
      counters_(counters),
      placement_(placement),
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
      // What is here already is answered also at the end.
      if (++taken_ >= kRequestsPerTurn) (void)take_turn();
    }
    if (!receive()) return;
  }
}

// The server may want to end the session while requests are in flight. They are finished, and what
// still comes meanwhile is refused, rather than left without an answer.
bool Session::is_over() noexcept {
  if (!cancel_.cancelled()) return false;
  refusing_ = true;
  if (in_flight_ == 0) idle_.cancel();
  return idle_.cancelled();
}

void Session::finish() noexcept {
  in_batch_ = false;
  account_.set_eager(true);
  replies_.flush();
  while (in_flight_ > 0) drained_.wait("requests to end");
  // A client that does not read its last replies is not waited for.
  base::Timer timer(
      [](void* session) noexcept {
        auto& self = *static_cast<Session*>(session);
        self.stream_.shutdown();
        self.given_up_.cancel();
      },
      this);
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
  small_ = head->length <= kLargePayload;
  if (head->type == static_cast<uint16_t>(wire::Command::kDisc)) {
    end("it disconnected");
    return false;
  }
  if (head->type == static_cast<uint16_t>(wire::Command::kBlockStatus) && head->payload > 0) {
    return take_status_query(*head);
  }
  if (const auto refusal = refuse(*head, rules())) return take_refused(*head, *refusal);
  if (ending()) return take_refused(*head, kEnding);
  const bool is_write = head->type == static_cast<uint16_t>(wire::Command::kWrite);
  const bool is_read = head->type == static_cast<uint16_t>(wire::Command::kRead);
  // A write that is here completely is written from where it lies.
  const bool is_status = head->type == static_cast<uint16_t>(wire::Command::kBlockStatus);
  const bool own_buffer = is_read || (is_write && input_.size() < head->length);
  Admitted request = admit(*head, own_buffer  ? BufferPool::room_for(head->length)
                                  : is_status ? commands_.room_for_status(*head)
                                              : 0);
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
  // The query goes before there is an answer.
  Admitted request = admit(head, commands_.room_for_status(head));
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
    if (!refusal && ending()) refusal = kEnding;
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
  const uint64_t charge = kOverhead + (is_write ? 0 : BufferPool::room_for(head->length));
  if (holds_too_much(charge) || !account_.try_take(charge)) return nullptr;
  Request* const out = make_request(*head, charge).release();
  input_.consume(header_size_);
  if (is_write) (void)take_payload(*out);  // lies in the input: it neither waits nor allocates
  return out;
}

// --- running ---

// Answers what can be answered without a fiber and without a copy. The rest, if any.
Request* Session::answer_borrowed(Request* first) noexcept {
  // TLS looks at the bytes; and what is borrowed while nothing can be sent is given back unused.
  if (!first->is_read() || stream_.tls() != nullptr || replies_.blocked()) return first;
  while (first != nullptr && commands_.borrow(*first)) {
    Request* const next = first->next;
    replies_.push(*first);
    first = next;
  }
  return first;
}

void Session::start(Request& all) noexcept {
  Request* const rest = answer_borrowed(&all);
  if (rest == nullptr) return;
  Request& first = *rest;
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
  if (refusing_ && in_flight_ == 0) {
    idle_.cancel();
    memory_.notify();
  }
  if (!in_batch_) {
    replies_.flush_soon();
    if (in_flight_ == 0) drained_.notify();
  }
}

void Session::on_sent(Request& request) noexcept {
  if (!request.shed) give_back_charge(request);
  resources_.give_back(request);
  memory_.notify();
}

void Session::give_back_charge(const Request& request) noexcept {
  if (request.charge > kLargeRequest) large_ -= request.charge;
  account_.give_back(request.charge);
}

// Who holds nothing is in nobody's way.
bool Session::on_stall(std::chrono::nanoseconds stalled) noexcept {
  return stalled >= options_.stall_limit && account_.used() > 0 && account_.budgets().contended();
}

bool Session::on_shed(Request& request, bool begun) noexcept {
  if (!commands_.shed(request, begun)) return false;
  give_back_charge(request);
  return true;
}

bool Session::on_restore(Request& request, bool begun) noexcept {
  if (request.shed) {
    if (!account_.try_take(request.charge) && !account_.wait(request.charge, given_up_)) {
      return false;
    }
    if (request.charge > kLargeRequest) large_ += request.charge;
    request.shed = false;
  }
  const bool asks = request.bare || request.redo;
  const bool whole = commands_.restore(request, begun);
  if (asks && !request.rereadable) bump(counters_.errors, uint64_t{1});
  return whole;
}

void Session::send_replies() noexcept {
  written_ = 0;
  if (replies_.gathered() == 0) return;
  pace_.sends(replies_.gathered());
  replies_.flush();
}

}  // namespace minivmm::nbd
