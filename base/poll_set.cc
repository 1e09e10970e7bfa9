// SPDX-License-Identifier: Apache-2.0
#include "base/poll_set.h"

#include <cerrno>

namespace minivmm::base {

bool PollSet::add(IoOp& op) noexcept {
  if (count_ == kMost) return false;
  places_[count_] = {&op, 0};
  fds_[count_] = {op.fd, static_cast<short>(op.flags), 0};
  ++count_;
  return true;
}

bool PollSet::remove(const IoOp& op) noexcept {
  for (size_t i = 0; i < count_; ++i) {
    if (places_[i].op != &op) continue;
    drop(i);
    return true;
  }
  return false;
}

void PollSet::drop(size_t i) noexcept {
  --count_;
  places_[i] = places_[count_];
  fds_[i] = fds_[count_];
}

void PollSet::look(CompletionSink& sink, IoBackend& backend) noexcept {
  if (count_ == 0 || ::poll(fds_.data(), count_, 0) <= 0) return;
  // From the end: what takes the place of one that goes was seen already.
  for (size_t i = count_; i-- > 0;) {
    IoOp& op = *places_[i].op;
    const short events = fds_[i].revents;
    if (events == 0) {
      if (++places_[i].passed_over < kPatience) continue;
      drop(i);
      backend.submit(op);
      continue;
    }
    drop(i);
    op.result = (events & POLLNVAL) != 0 ? -EBADF : events;
    sink.on_complete(op);
  }
}

void PollSet::hand_over(IoBackend& backend) noexcept {
  for (size_t i = 0; i < count_; ++i) backend.submit(*places_[i].op);
  count_ = 0;
}

}  // namespace minivmm::base
