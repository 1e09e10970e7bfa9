// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/pool.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::block {
namespace {

using base::Clock;
using base::Error;

constexpr auto kConnectLimit = std::chrono::seconds(10);
// Pauses between attempts to reach a server that went away.
constexpr auto kFirstPause = std::chrono::milliseconds(50);
constexpr auto kLongestPause = std::chrono::seconds(5);
constexpr auto kFarewell = std::chrono::seconds(2);
constexpr unsigned kMaxAutomatic = 4;
// A command whose connection breaks so often is taken to be the reason.
constexpr unsigned kMaxTries = 6;

}  // namespace

void NbdPool::open() {
  const auto deadline = Clock::now() + target_.open_timeout;
  for (auto pause = Clock::duration(kFirstPause);;
       pause = std::min<Clock::duration>(2 * pause, kLongestPause)) {
    try {
      Link link =
          NbdLink::connect(target_, std::max(deadline, Clock::now() + kConnectLimit), closing_);
      watch(*link);
      info_ = link->info();
      const std::lock_guard lock(mutex_);
      if (closing_) {
        link->cut();
        throw Error(ECANCELED, fmt::format("{}: {}", target_.uri.text(), why_));
      }
      links_.push_back(std::move(link));
      return;
    } catch (const Error&) {
      if (closing_ || Clock::now() + pause >= deadline) throw;
    }
    std::unique_lock lock(mutex_);
    if (!closing_) (void)changed_.wait_until(lock, Clock::now() + pause, "the next attempt");
  }
}

// --- commands ---

int NbdPool::run(NbdCommand& command) {
  for (unsigned tries = 1;; ++tries) {
    const Link link = use();
    const int result = link->run(command);
    if (result != NbdLink::kLost) return result;
    lost(link);
    if (tries == kMaxTries) {
      throw Error(EIO, fmt::format("{}: the connection breaks whenever this request is made",
                                   target_.uri.text()));
    }
  }
}

NbdPool::Link NbdPool::use() {
  std::unique_lock lock(mutex_);
  while (links_.empty()) {
    const auto deadline = lost_at_ + target_.reconnect_delay;
    if (closing_ || Clock::now() >= deadline) {
      throw Error(EIO, fmt::format("{}: the server is away{}", target_.uri.text(),
                                   why_.empty() ? "" : " (" + why_ + ")"));
    }
    ++held_;
    (void)changed_.wait_until(lock, deadline, "an NBD server to come back");
    --held_;
  }
  return pick(*base::EventLoop::current());
}

// Under mutex_. One of this loop, with the least to do; another loop's where it has none.
NbdPool::Link NbdPool::pick(base::EventLoop& loop) {
  const auto rank = [&loop](const Link& link) {
    return std::pair(&link->home() != &loop, link->load());
  };
  const auto best =
      std::min_element(links_.begin(), links_.end(),
                       [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  const unsigned most = target_.connections != 0 ? target_.connections : kMaxAutomatic;
  const bool more = info_.multi_conn && links_.size() + growing_.size() < most;
  const bool wanted =
      &(*best)->home() != &loop || (target_.connections != 0 && (*best)->load() > 0);
  if (more && wanted && growing_.insert(&loop).second) grow(loop);
  return *best;
}

// Makes another connection for `loop`, which is the present one, in the background.
void NbdPool::grow(base::EventLoop& loop) {
  fibers_.add();
  loop.spawn("nbd connect", [self = shared_from_this(), &loop] {
    Link made;
    try {
      made = NbdLink::connect(self->target_, Clock::now() + kConnectLimit, self->closing_);
      self->watch(*made);
      self->check_same(made->info());
      const std::lock_guard lock(self->mutex_);
      // With none left the server went away meanwhile: the next ones are made by reconnect().
      if (!self->links_.empty() && !self->closing_) {
        self->links_.push_back(std::exchange(made, nullptr));
      }
      self->growing_.erase(&loop);
    } catch (const std::exception& e) {
      // Those that there are have to do: growing_ keeps the loop, so that it is not tried again.
      base::log_debug("{}: no further connection: {}", self->target_.uri.text(), e.what());
    }
    if (made) made->cut();
    self->fibers_.done();
  });
}

// --- when the server goes away ---

// Noticed at once, not by the next request: that one finds the server back, if it is.
void NbdPool::watch(NbdLink& link) {
  link.when_ended([weak = weak_from_this()](const Link& ended) {
    if (const auto self = weak.lock()) self->lost(ended);
  });
}

void NbdPool::lost(const Link& link) {
  std::vector<Link> others;
  {
    const std::lock_guard lock(mutex_);
    if (std::find(links_.begin(), links_.end(), link) == links_.end()) return;
    others.swap(links_);
    growing_.clear();
    lost_at_ = Clock::now();
    why_.clear();
    if (closing_) return;
    fibers_.add();
  }
  base::log_warning("{}: the server closed the connection; requests {}", target_.uri.text(),
                    target_.reconnect_delay.count() > 0 ? "wait for it" : "fail until it is back");
  for (const Link& each : others) each->cut();
  base::EventLoop::current()->spawn("nbd reconnect",
                                    [self = shared_from_this(), before = std::move(others)] {
                                      self->reconnect(before);
                                      self->fibers_.done();
                                    });
}

void NbdPool::reconnect(const std::vector<Link>& before) {
  // What they were told is in unflushed_ once they have ended.
  for (const Link& each : before) each->close(Clock::now() + kFarewell);
  auto pause = Clock::duration(kFirstPause);
  while (!closing_ && !try_again()) {
    std::unique_lock lock(mutex_);
    if (!closing_) (void)changed_.wait_until(lock, Clock::now() + pause, "the next attempt");
    pause = std::min<Clock::duration>(2 * pause, kLongestPause);
  }
}

bool NbdPool::try_again() {
  std::string why;
  try {
    Link link = NbdLink::connect(target_, Clock::now() + kConnectLimit, closing_);
    watch(*link);
    check_same(link->info());
    do_unflushed_again(link);
    reconnects_.fetch_add(1, std::memory_order_relaxed);
    base::log_info("{}: connected again", target_.uri.text());
    const std::lock_guard lock(mutex_);
    links_.push_back(std::move(link));
    changed_.notify_all();
    return true;
  } catch (const std::exception& e) {
    why = e.what();
  }
  base::log_debug("{}: not yet: {}", target_.uri.text(), why);
  const std::lock_guard lock(mutex_);
  why_ = std::move(why);
  return false;
}

void NbdPool::check_same(const NbdExport& now) const {
  if (now.size == info_.size && now.read_only == info_.read_only &&
      now.minimum_block <= std::max(info_.minimum_block, 1u) && now.flush == info_.flush) {
    return;
  }
  throw Error(ESTALE, fmt::format("{}: the server offers another export under this name now: of {} "
                                  "bytes, and it had {}",
                                  target_.uri.text(), now.size, info_.size));
}

void NbdPool::do_unflushed_again(const Link& link) {
  {
    const std::lock_guard lock(mutex_);
    repeated_ = link;
    if (closing_) link->cut();
  }
  int result = 0;
  for (const auto& record : unflushed_.records()) {
    NbdCommand command = record->command;
    result = link->run(command);
    if (result != 0) break;
  }
  const std::lock_guard lock(mutex_);
  repeated_.reset();
  if (result == 0) return;
  link->cut();
  throw Error(result > 0 ? result : EIO, "a write of before could not be done again");
}

// --- the end ---

void NbdPool::limit_waits() noexcept {
  if (limited_.exchange(true)) return;
  fibers_.add();
  try {
    base::EventLoop::current()->spawn("nbd end", [self = shared_from_this()] {
      self->watch_silence();
      self->fibers_.done();
    });
  } catch (const std::bad_alloc&) {
    fibers_.done();
    base::log_error("{}: no memory to end it in time", target_.uri.text());
  }
}

void NbdPool::watch_silence() {
  const auto step = target_.closing_timeout / 8;
  auto since = Clock::now();
  uint64_t before = 0;
  std::unique_lock lock(mutex_);
  while (!closing_) {
    bool waits = held_ > 0;
    uint64_t answers = reconnects();
    const auto look_at = [&](const Link& link) {
      waits = waits || link->load() > 0;
      answers += link->answers();
    };
    for (const Link& each : links_) look_at(each);
    if (repeated_) look_at(repeated_);
    const auto now = Clock::now();
    if (!waits || answers != before) {
      before = answers;
      since = now;
    } else if (now - since >= target_.closing_timeout) {
      std::string why = fmt::format("it has not answered for {} ms while the disk is being closed",
                                    target_.closing_timeout.count());
      base::log_warning("{}: the server is given up: {}", target_.uri.text(), why);
      return cut_all(std::move(why));
    }
    (void)changed_.wait_until(lock, now + step, "an NBD server's last answers");
  }
}

// Under mutex_.
void NbdPool::cut_all(std::string why) noexcept {
  closing_ = true;
  why_ = std::move(why);
  given_up_.swap(links_);
  for (const Link& each : given_up_) each->cut();
  if (repeated_) repeated_->cut();
  changed_.notify_all();
}

void NbdPool::give_up(const std::string& why) {
  const std::lock_guard lock(mutex_);
  if (!closing_) cut_all(why);
}

void NbdPool::close() {
  std::vector<Link> links;
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    links.swap(links_);
    links.insert(links.end(), given_up_.begin(), given_up_.end());
    if (repeated_) repeated_->cut();
    changed_.notify_all();
  }
  const auto deadline =
      Clock::now() + std::min<Clock::duration>(kFarewell, target_.closing_timeout);
  bool in_time = true;
  for (const Link& each : links) in_time = each->close(deadline) && in_time;
  if (!in_time) {
    base::log_warning("{}: the server did not end the connection: it was cut", target_.uri.text());
  }
  fibers_.wait();
}

unsigned NbdPool::connections() const {
  const std::lock_guard lock(mutex_);
  return static_cast<unsigned>(links_.size());
}

}  // namespace minivmm::block
