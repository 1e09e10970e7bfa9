// SPDX-License-Identifier: Apache-2.0
#include "load_thread.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/error.h"
#include "clock.h"

namespace minivmm::bench {
namespace {

constexpr int kSilenceSeconds = 20;
constexpr unsigned kMaxConnections = 64;

struct Share {
  std::uint64_t first = 0;
  std::uint64_t blocks = 0;
};

Share share_of(const Share& whole, unsigned index, unsigned parts) {
  const std::uint64_t each = whole.blocks / parts;
  if (each == 0) throw base::Error(EINVAL, "the range has fewer blocks than connections");
  return {whole.first + each * index, each};
}

}  // namespace

LoadThread::LoadThread(const LoadOptions& options, unsigned index) : options_(options) {
  const unsigned mine = options_.connections / options_.threads;
  if (mine == 0 || mine > kMaxConnections || options_.connections % options_.threads != 0) {
    throw base::Error(EINVAL, "connections must be a multiple of threads, at most 64 each");
  }
  Share share;
  for (unsigned i = 0; i < mine; ++i) {
    base::UniqueFd socket = connect_to(options_.address);
    const timeval silence{kSilenceSeconds, 0};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &silence, sizeof silence);
    const NbdExport what =
        handshake_as_client(socket.get(), options_.address.export_name, options_.structured);
    if (i == 0) {
      const std::uint64_t range =
          options_.range == 0 ? what.size : std::min(options_.range, what.size);
      share = share_of({0, range / options_.block_size}, index, options_.threads);
      if (options_.verify) {
        model_ = std::make_unique<LoadModel>(share.first, share.blocks, options_.block_size,
                                             options_.seed);
      }
    }
    // Random loads of one thread share its range, sequential and verified ones divide it.
    const bool random = options_.kind != LoadKind::kRead && options_.kind != LoadKind::kWrite;
    const Share part = random && !options_.verify ? share : share_of(share, i, mine);
    const std::uint64_t seed = options_.seed * 1000 + index * kMaxConnections + i;
    LoadPlan plan(options_.kind, part.first, part.blocks, seed, model_.get());
    connections_.push_back(std::make_unique<LoadConnection>(
        std::move(socket), what, plan, options_.block_size, options_.depth, model_.get()));
  }
}

LoadResult LoadThread::run() {
  LoadResult result;
  const std::uint64_t begin = now_ns();
  load_until(begin + static_cast<std::uint64_t>(options_.ramp * 1e9));
  result.mismatches = take_stats().mismatches;

  const std::uint64_t start = now_ns();
  const std::uint64_t cpu = clock_ns(CLOCK_THREAD_CPUTIME_ID);
  load_until(start + static_cast<std::uint64_t>(options_.seconds * 1e9));
  result.cpu_seconds = static_cast<double>(clock_ns(CLOCK_THREAD_CPUTIME_ID) - cpu) * 1e-9;
  result.seconds = static_cast<double>(now_ns() - start) * 1e-9;
  result.stats = take_stats();

  drain();
  if (options_.verify) recheck();
  result.mismatches += result.stats.mismatches + take_stats().mismatches;
  for (const auto& c : connections_) c->disconnect();
  return result;
}

void LoadThread::load_until(std::uint64_t deadline) {
  while (now_ns() < deadline) turn(true);
}

void LoadThread::drain() {
  const auto busy = [](const auto& c) { return !c->idle(); };
  while (std::any_of(connections_.begin(), connections_.end(), busy)) turn(false);
}

void LoadThread::recheck() {
  for (const auto& c : connections_) c->plan().begin_recheck();
  do {
    turn(true);
  } while (std::any_of(connections_.begin(), connections_.end(),
                       [](const auto& c) { return !c->idle(); }));
}

void LoadThread::turn(bool may_fill) {
  const std::uint64_t now = now_ns();
  for (const auto& c : connections_) {
    if (may_fill) c->fill(now);
    if (c->wants_to_send()) c->send();
  }
  LoadConnection& first = *connections_.front();
  if (connections_.size() == 1 && !options_.spin && !first.wants_to_send()) {
    if (!first.idle()) first.receive(true);
    return;
  }
  if (!options_.spin) wait_for_sockets();
  for (const auto& c : connections_) {
    if (!c->idle()) c->receive(false);
  }
}

void LoadThread::wait_for_sockets() {
  std::array<pollfd, kMaxConnections> fds{};
  bool waiting = false;
  for (std::size_t i = 0; i < connections_.size(); ++i) {
    const LoadConnection& c = *connections_[i];
    fds[i].fd = c.fd();
    fds[i].events = static_cast<short>((c.idle() ? 0 : POLLIN) | (c.wants_to_send() ? POLLOUT : 0));
    waiting = waiting || fds[i].events != 0;
  }
  if (!waiting) return;
  const int n = ::poll(fds.data(), connections_.size(), kSilenceSeconds * 1000);
  if (n < 0 && errno != EINTR) throw base::errno_error(errno, "poll");
  if (n == 0) throw base::Error(ETIMEDOUT, "the server stays silent");
}

LoadStats LoadThread::take_stats() {
  LoadStats sum;
  for (const auto& c : connections_) {
    LoadStats& s = c->stats();
    sum.latency.merge(s.latency);
    sum.errors += s.errors;
    sum.mismatches += s.mismatches;
    sum.sends += s.sends;
    sum.receives += s.receives;
    s = LoadStats{};
  }
  return sum;
}

}  // namespace minivmm::bench
