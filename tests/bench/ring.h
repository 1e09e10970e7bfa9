// SPDX-License-Identifier: Apache-2.0
// Owner of an io_uring ring for the measuring tools. One thread makes, submits to and reaps it.
#pragma once

#include <cerrno>

#include <liburing.h>

#include "base/error.h"

namespace minivmm::bench {

class Ring {
 public:
  explicit Ring(unsigned entries,
                unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN) {
    const int r = io_uring_queue_init(entries, &ring_, flags);
    if (r < 0) throw base::errno_error(-r, "cannot make an io_uring ring");
  }
  ~Ring() { io_uring_queue_exit(&ring_); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  io_uring* get() { return &ring_; }

  // A free submission entry; submits what is queued when there is none.
  io_uring_sqe* sqe() {
    io_uring_sqe* e = io_uring_get_sqe(&ring_);
    if (e == nullptr) {
      submit(0);
      e = io_uring_get_sqe(&ring_);
    }
    if (e == nullptr) throw base::Error(EBUSY, "the io_uring submission queue stays full");
    return e;
  }

  // Submits and waits for `wait` completions in one system call.
  void submit(unsigned wait) {
    const int r = io_uring_submit_and_wait(&ring_, wait);
    if (r < 0 && r != -EINTR) throw base::errno_error(-r, "io_uring_enter failed");
  }

  // Calls fn(user_data, result, flags) for each completion that is there; returns their number.
  template <typename Fn>
  unsigned reap(Fn&& fn) {
    unsigned head = 0;
    unsigned n = 0;
    io_uring_cqe* cqe = nullptr;
    io_uring_for_each_cqe(&ring_, head, cqe) {
      ++n;
      fn(cqe->user_data, cqe->res, cqe->flags);
    }
    io_uring_cq_advance(&ring_, n);
    return n;
  }

 private:
  io_uring ring_{};
};

}  // namespace minivmm::bench
