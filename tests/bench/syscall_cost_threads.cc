// SPDX-License-Identifier: Apache-2.0
// Wakes and messages between two threads. A "round trip" is there and back, so one wake-up and
// delivery costs half of it.
#include <poll.h>
#include <sched.h>
#include <string>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

#include "base/error.h"
#include "base/unique_fd.h"
#include "ring.h"
#include "syscall_cost.h"

namespace minivmm::bench {
namespace {

constexpr std::size_t kMessage = 28;  // an NBD request

void must(bool ok, const char* what) {
  if (!ok) throw base::errno_error(errno, what);
}

// Puts the calling thread on one CPU; -1 leaves it to the scheduler.
void pin(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (unsigned c = 0; c < std::thread::hardware_concurrency(); ++c) {
    if (cpu < 0 || static_cast<unsigned>(cpu) == c) CPU_SET(c, &set);
  }
  ::sched_setaffinity(0, sizeof set, &set);
}

class SocketPair {
 public:
  SocketPair() {
    int fds[2];
    must(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
    ends_[0].reset(fds[0]);
    ends_[1].reset(fds[1]);
  }
  int here() const { return ends_[0].get(); }
  int there() const { return ends_[1].get(); }
  void end() { ::shutdown(here(), SHUT_RDWR); }

 private:
  std::array<base::UniqueFd, 2> ends_;
};

bool blocking_turn(int fd, char* buffer) {
  if (::read(fd, buffer, kMessage) <= 0) return false;
  return ::send(fd, buffer, kMessage, MSG_NOSIGNAL) == static_cast<ssize_t>(kMessage);
}

void send_request(int fd, char* buffer) {
  must(::send(fd, buffer, kMessage, MSG_NOSIGNAL) == static_cast<ssize_t>(kMessage), "send");
}

using Echo = std::function<void(int)>;

// Both threads on one CPU or on two; the reader here either sleeps or spins on recv.
void socket_round_trip(const CostOptions& o, const std::string& what, const Echo& echo,
                       int other_cpu, bool spin) {
  SocketPair pair;
  std::thread other([&] {
    pin(other_cpu);
    echo(pair.there());
  });
  pin(0);
  char buffer[kMessage] = {};
  cost(o, what.c_str(), 1, [&] {
    send_request(pair.here(), buffer);
    ssize_t n = -1;
    do {
      n = ::recv(pair.here(), buffer, kMessage, spin ? MSG_DONTWAIT : 0);
    } while (n < 0 && errno == EAGAIN);
    must(n == static_cast<ssize_t>(kMessage), "recv");
  });
  pair.end();
  other.join();
  pin(-1);
}

void socket_round_trips(const CostOptions& o, const std::string& echo_name, const Echo& echo) {
  const std::string name = "socket round trip, " + echo_name;
  socket_round_trip(o, name + ", one CPU", echo, 0, false);
  socket_round_trip(o, name + ", two CPUs", echo, 1, false);
  socket_round_trip(o, name + ", two CPUs, client spins", echo, 1, true);
}

void echo_blocking(int fd) {
  char buffer[kMessage];
  while (blocking_turn(fd, buffer)) {
  }
}

void echo_epoll(int fd) {
  const base::UniqueFd poll(::epoll_create1(EPOLL_CLOEXEC));
  epoll_event event{};
  event.events = EPOLLIN;
  must(::epoll_ctl(poll.get(), EPOLL_CTL_ADD, fd, &event) == 0, "epoll_ctl");
  char buffer[kMessage];
  do {
    must(::epoll_wait(poll.get(), &event, 1, -1) == 1, "epoll_wait");
  } while (blocking_turn(fd, buffer));
}

// Never sleeps: what a server that polls for a while before sleeping reaches while it polls.
void echo_spinning(int fd) {
  char buffer[kMessage];
  for (;;) {
    const ssize_t n = ::recv(fd, buffer, kMessage, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) continue;
    if (n <= 0) return;
    if (::send(fd, buffer, kMessage, MSG_NOSIGNAL) <= 0) return;
  }
}

// One enter a turn: the reply's send and the next recv are submitted together.
void echo_ring(int fd, bool poll_first) {
  Ring ring(8);
  char in[kMessage];
  char out[kMessage] = {};
  bool open = true;
  bool answer = false;
  while (open) {
    unsigned wait = 1;
    if (answer) {
      io_uring_sqe* s = ring.sqe();
      io_uring_prep_send(s, fd, out, kMessage, MSG_NOSIGNAL);
      s->user_data = 2;
      wait = 2;
    }
    io_uring_sqe* r = ring.sqe();
    io_uring_prep_recv(r, fd, in, kMessage, 0);
    if (poll_first) r->ioprio |= IORING_RECVSEND_POLL_FIRST;
    r->user_data = 1;
    ring.submit(wait);
    bool received = false;
    const auto take = [&](std::uint64_t data, int result, unsigned) {
      if (data == 1) received = true;
      if (data == 1 && result <= 0) open = false;
    };
    ring.reap(take);
    while (!received) {
      ring.submit(1);
      ring.reap(take);
    }
    answer = true;
  }
}

// The ring only tells that the socket is readable (a multishot poll); recv and send are direct.
void echo_ring_poll(int fd) {
  Ring ring(8);
  io_uring_prep_poll_multishot(ring.sqe(), fd, POLLIN);
  char buffer[kMessage];
  for (;;) {
    ring.submit(1);
    bool end = false;
    ring.reap([&](std::uint64_t, int result, unsigned) { end = end || result < 0; });
    if (end || !blocking_turn(fd, buffer)) return;
  }
}

void eventfd_costs(const CostOptions& o, int other_cpu) {
  const base::UniqueFd to(::eventfd(0, EFD_CLOEXEC));
  const base::UniqueFd from(::eventfd(0, EFD_CLOEXEC));
  std::atomic<bool> stop{false};
  pin(0);
  std::thread other([&] {
    pin(other_cpu);
    std::uint64_t v = 1;
    while (::read(to.get(), &v, sizeof v) == sizeof v && !stop) {
      if (::write(from.get(), &v, sizeof v) != sizeof v) return;
    }
  });
  std::uint64_t v = 1;
  cost(o, other_cpu == 0 ? "eventfd round trip, one CPU" : "eventfd round trip, two CPUs", 1, [&] {
    v = 1;
    must(::write(to.get(), &v, sizeof v) == sizeof v, "eventfd write");
    must(::read(from.get(), &v, sizeof v) == sizeof v, "eventfd read");
  });
  stop = true;
  must(::write(to.get(), &v, sizeof v) == sizeof v, "eventfd write");
  other.join();
  pin(-1);
}

// A wake of a thread that sleeps in its ring, as an event loop's remote queue does it.
void ring_wake_costs(const CostOptions& o, bool ring_message) {
  const base::UniqueFd to(::eventfd(0, EFD_CLOEXEC));
  const base::UniqueFd from(::eventfd(0, EFD_CLOEXEC));
  std::atomic<bool> stop{false};
  std::atomic<int> target{-1};
  pin(0);
  std::thread other([&] {
    pin(1);
    Ring ring(8);
    std::uint64_t v = 0;
    target = ring.get()->ring_fd;
    while (!stop) {
      if (!ring_message) io_uring_prep_read(ring.sqe(), to.get(), &v, sizeof v, 0);
      ring.submit(1);
      ring.reap([](std::uint64_t, int, unsigned) {});
      const std::uint64_t one = 1;
      if (::write(from.get(), &one, sizeof one) != sizeof one) return;
    }
  });
  while (target < 0) std::this_thread::yield();
  Ring mine(8);
  std::uint64_t v = 1;
  const auto wake = [&] {
    if (ring_message) {
      io_uring_prep_msg_ring(mine.sqe(), target, 0, 7, 0);
      mine.submit(1);
      mine.reap([](std::uint64_t, int, unsigned) {});
    } else {
      v = 1;
      must(::write(to.get(), &v, sizeof v) == sizeof v, "eventfd write");
    }
    must(::read(from.get(), &v, sizeof v) == sizeof v, "eventfd read");
  };
  cost(o,
       ring_message ? "MSG_RING to a ring, eventfd back: round trip, two CPUs"
                    : "eventfd to a ring, eventfd back: round trip, two CPUs",
       1, wake);
  stop = true;
  wake();
  other.join();
  pin(-1);
}

// A hand-off without a system call as long as both sides are awake.
void spin_cost(const CostOptions& o) {
  std::atomic<int> turn{0};
  std::thread other([&] {
    for (;;) {
      int t = turn.load(std::memory_order_acquire);
      if (t == 2) return;
      if (t == 1) turn.store(0, std::memory_order_release);
    }
  });
  cost(o, "spinning round trip between threads (two CPUs)", 1, [&] {
    turn.store(1, std::memory_order_release);
    while (turn.load(std::memory_order_acquire) != 0) {
    }
  });
  turn = 2;
  other.join();
}

}  // namespace

void thread_costs(const CostOptions& o) {
  eventfd_costs(o, 0);
  eventfd_costs(o, 1);
  ring_wake_costs(o, false);
  ring_wake_costs(o, true);
  socket_round_trips(o, "read+send", echo_blocking);
  socket_round_trips(o, "epoll_wait+read+send", echo_epoll);
  socket_round_trips(o, "ring poll multishot, read+send", echo_ring_poll);
  socket_round_trips(o, "ring send+recv in one enter", [](int fd) { echo_ring(fd, false); });
  socket_round_trips(o, "the same, POLL_FIRST", [](int fd) { echo_ring(fd, true); });
  socket_round_trips(o, "recv spins, send", echo_spinning);
  spin_cost(o);
}

}  // namespace minivmm::bench
