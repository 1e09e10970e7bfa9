// SPDX-License-Identifier: Apache-2.0
#include "vmm/serial_socket.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <system_error>

#include "base/error.h"
#include "vmm/kick.h"
#include "vmm/thread_filter.h"

namespace minivmm::vmm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kPieceBytes = 2048;
constexpr auto kStopLimit = std::chrono::seconds(1);

bool would_block() noexcept { return errno == EAGAIN || errno == EINTR; }

}  // namespace

SerialSocket::SerialSocket(base::UniqueFd listening, bool confine)
    : listening_(std::move(listening)),
      confine_(confine),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  int ends[2];
  if (!wake_ || ::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) {
    throw base::errno_error(errno, "serial socket: no descriptors");
  }
  machine_end_.reset(ends[0]);
  our_end_.reset(ends[1]);
  const ServiceThreadSignals signals;
  try {
    thread_ = std::thread([this] { loop(); });
  } catch (const std::system_error& error) {
    throw base::errno_error(error.code().value(), "serial socket: cannot make a thread");
  }
}

SerialSocket::~SerialSocket() {
  stopping_.store(true);
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
  thread_.join();
}

void SerialSocket::loop() {
  ::pthread_setname_np(::pthread_self(), "serial-socket");
  if (confine_) confine_thread(ThreadKind::kSerial, "serial-socket");
  Clock::time_point give_up = Clock::time_point::max();
  while (Clock::now() < give_up) {
    const bool stopping = stopping_.load();
    if (stopping && give_up == Clock::time_point::max()) give_up = Clock::now() + kStopLimit;
    // Without a client the oldest bytes make room; one that is slow is waited for.
    const bool room = !client_ || kept_.size() < kKeptBytes;
    const short client_wants =
        static_cast<short>((kept_.empty() ? 0 : POLLOUT) | (typed_.empty() ? POLLIN : 0));
    const short machine_wants =
        static_cast<short>((room ? POLLIN : 0) | (typed_.empty() ? 0 : POLLOUT));
    std::array<pollfd, 4> fds{{{stopping ? -1 : wake_.get(), POLLIN, 0},
                               {client_ || stopping ? -1 : listening_.get(), POLLIN, 0},
                               {our_end_.get(), machine_wants, 0},
                               {client_ ? client_.get() : -1, client_wants, 0}}};
    const int ready = ::poll(fds.data(), fds.size(), stopping ? 10 : -1);
    if (ready < 0) continue;
    if (stopping && ready == 0 && (kept_.empty() || !client_)) return;
    if ((fds[1].revents & POLLIN) != 0) accept_client();
    if ((fds[2].revents & POLLIN) != 0) from_machine();
    if ((fds[2].revents & POLLOUT) != 0) to_machine();
    if ((fds[3].revents & POLLOUT) != 0) to_client();
    if ((fds[3].revents & (POLLIN | POLLHUP | POLLERR)) != 0) from_client();
  }
}

void SerialSocket::accept_client() {
  client_.reset(::accept4(listening_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

void SerialSocket::drop_client() noexcept {
  client_.reset();
  typed_.clear();
}

void SerialSocket::from_machine() {
  std::array<std::byte, kPieceBytes> piece;
  const ssize_t n = ::recv(our_end_.get(), piece.data(), piece.size(), 0);
  if (n <= 0) return;
  kept_.insert(kept_.end(), piece.begin(), piece.begin() + n);
  if (!client_ && kept_.size() > kKeptBytes) {
    kept_.erase(kept_.begin(), kept_.end() - static_cast<ptrdiff_t>(kKeptBytes));
  }
}

void SerialSocket::to_client() {
  std::array<std::byte, kPieceBytes> piece;
  const auto count = static_cast<ptrdiff_t>(std::min(piece.size(), kept_.size()));
  std::copy_n(kept_.begin(), count, piece.begin());
  const ssize_t n = ::send(client_.get(), piece.data(), static_cast<size_t>(count), MSG_NOSIGNAL);
  if (n > 0) kept_.erase(kept_.begin(), kept_.begin() + n);
  if (n < 0 && !would_block()) drop_client();
}

void SerialSocket::from_client() {
  if (!client_ || !typed_.empty()) return;
  typed_.resize(kPieceBytes);
  const ssize_t n = ::recv(client_.get(), typed_.data(), typed_.size(), 0);
  typed_.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
  if (n == 0 || (n < 0 && !would_block())) drop_client();
}

void SerialSocket::to_machine() {
  const ssize_t n = ::send(our_end_.get(), typed_.data(), typed_.size(), MSG_NOSIGNAL);
  if (n > 0) typed_.erase(typed_.begin(), typed_.begin() + n);
}

}  // namespace minivmm::vmm
