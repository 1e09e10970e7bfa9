// SPDX-License-Identifier: Apache-2.0
// One connection of a device whose server wants TLS: what the kernel's driver sends in the clear
// through a local socket goes to the server encrypted, and back. Never waits; what is under way is
// bounded, so that who does not read holds up who sends. One thread.
#pragma once

#include <poll.h>

#include <chrono>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>

#include "base/unique_fd.h"
#include "nbd-server/tls_session.h"

namespace minivmm::cli {

class NbdTlsPump {
 public:
  using Clock = std::chrono::steady_clock;

  // The session is the server's socket's, after its handshake.
  NbdTlsPump(base::UniqueFd local, base::UniqueFd far, std::unique_ptr<nbd::TlsSession> tls);

  // What to wait for, unless there is more to do at once.
  void say_what_to_poll(pollfd& local, pollfd& far) const noexcept;
  bool has_more() const noexcept { return has_more_; }
  // Until when, once one end is gone: it ends then, whatever the other does.
  std::optional<Clock::time_point> deadline() const noexcept { return deadline_; }

  // Moves what can be moved, given what poll() said.
  void work(short local_events, short far_events) noexcept;
  // Both sockets can be closed.
  bool has_ended() const noexcept { return ended_; }

 private:
  // What one end has sent and the other has not taken yet.
  class Flow {
   public:
    static constexpr size_t kMost = size_t{128} << 10;
    bool empty() const noexcept { return begin_ == end_; }
    std::span<std::byte> room() noexcept { return {bytes_.get(), kMost}; }  // where it is empty
    void fill(size_t size) noexcept { begin_ = 0, end_ = size; }
    std::span<std::byte> rest() noexcept { return {bytes_.get() + begin_, end_ - begin_}; }
    void take(size_t size) noexcept { begin_ += size; }
    void drop() noexcept { begin_ = end_ = 0; }

   private:
    std::unique_ptr<std::byte[]> bytes_ = std::make_unique<std::byte[]>(kMost);
    size_t begin_ = 0;
    size_t end_ = 0;
  };

  bool take_from_local() noexcept;
  bool give_to_far() noexcept;
  bool take_from_far() noexcept;
  bool give_to_local() noexcept;
  void say_bye() noexcept;
  bool is_saying_bye() const noexcept;
  void look_for_the_end(bool moved) noexcept;

  const base::UniqueFd local_;
  const base::UniqueFd far_;
  const std::unique_ptr<nbd::TlsSession> tls_;  // goes before its socket
  Flow up_;                                     // to the server
  Flow down_;
  bool local_readable_ = true;
  bool far_readable_ = true;  // by what TLS keeps as well, which poll() does not see
  bool local_ended_ = false;  // sends no more
  bool local_gone_ = false;   // takes no more
  bool far_ended_ = false;
  bool said_bye_ = false;
  bool is_shut_ = false;  // to the server
  bool has_more_ = false;
  bool ended_ = false;
  std::optional<Clock::time_point> deadline_;
};

}  // namespace minivmm::cli
