// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/session.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/io.h"
#include "base/log.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"

namespace minivmm::control::qmp {
namespace {

constexpr size_t kReceiveBytes = 16384;
constexpr const char* kNegotiate = "qmp_capabilities";

// Cancels a wait when its time is up. Lives across one wait.
class Deadline {
 public:
  Deadline(base::EventLoop& loop, base::Clock::time_point deadline)
      : loop_(loop), timer_(fire, this) {
    loop_.timers().arm(timer_, deadline);
  }
  ~Deadline() { loop_.timers().disarm(timer_); }
  Deadline(const Deadline&) = delete;
  Deadline& operator=(const Deadline&) = delete;
  base::CancelSource& source() noexcept { return cancel_; }

 private:
  static void fire(void* self) noexcept { static_cast<Deadline*>(self)->cancel_.cancel(); }
  base::EventLoop& loop_;
  base::CancelSource cancel_;
  base::Timer timer_;
};

}  // namespace

Session::Session(base::EventLoop& loop, base::UniqueFd connected, Target& target,
                 const SessionLimits& limits)
    : loop_(loop), fd_(std::move(connected)), target_(target), limits_(limits) {}

void Session::run() {
  send(greeting_line());
  receive_and_answer();
  (void)drain(base::Clock::now() + limits_.last_words);
  cut();
  // The fiber that writes looks at this object.
  std::unique_lock lock(mutex_);
  while (writing_) written_.wait(lock, "a control client's last bytes");
}

void Session::receive_and_answer() {
  input_.resize(kReceiveBytes);
  while (!ending_ && !broken_) {
    answer_waiting();
    if (ending_ || broken_ || !receive()) return;
  }
}

// False: the client has said all it will, or it is to end.
bool Session::receive() {
  while (!reading_.cancelled()) {
    const ssize_t n = ::recv(fd_.get(), input_.data(), input_.size(), MSG_DONTWAIT);
    if (n > 0) {
      splitter_.feed(std::string_view(input_).substr(0, static_cast<size_t>(n)));
      return true;
    }
    if (n == 0) return false;
    if (errno == EAGAIN) {
      (void)base::io::poll(fd_.get(), POLLIN, &reading_);
    } else if (errno != EINTR) {
      broken_ = true;
      return false;
    }
  }
  return false;
}

void Session::answer_waiting() {
  while (!ending_ && !broken_) {
    const auto piece = splitter_.next();
    if (!piece) return;
    send(answer(*piece));
    if (!drain(base::Clock::time_point::max())) return;
  }
}

std::string Session::answer(const MessageSplitter::Piece& piece) {
  Json id;
  try {
    if (!piece.problem.empty()) throw Failure(piece.problem);
    Request request = parse_request(piece.text, id);
    running_ = request.command;
    Json value = execute(request.command, std::move(request.arguments));
    running_.clear();
    return return_line(value, id);
  } catch (const std::exception&) {
    running_.clear();
    return error_line(std::current_exception(), id);
  }
}

Json Session::execute(const std::string& command, Json arguments) {
  if (command != kNegotiate) {
    if (negotiated_) return run_command(target_, command, std::move(arguments));
    throw Failure(ErrorClass::kCommandNotFound,
                  fmt::format("Expecting capabilities negotiation with '{}'", kNegotiate));
  }
  if (negotiated_) {
    throw Failure(ErrorClass::kCommandNotFound,
                  "Capabilities negotiation is already complete, command ignored");
  }
  static constexpr Parameter kParameters[] = {{"enable", Kind::kStrings, true}};
  const auto wanted = Arguments(kParameters, std::move(arguments)).strings("enable");
  if (!wanted.empty()) {
    throw Failure(fmt::format("The capability '{}' was not offered", wanted.front()));
  }
  negotiated_ = true;
  return Json::object();
}

void Session::send_event(const std::string& line) {
  if (!negotiated_ || broken_ || ending_) return;
  if (output_.size() + line.size() > limits_.waiting_bytes) {
    base::log_warning("control socket: a client does not read its events, it is cut off");
    cut();
    return;
  }
  send(line);
}

void Session::end() {
  ending_ = true;
  reading_.cancel();
}

// --- writing ---

void Session::send(std::string_view line) {
  if (broken_) return;
  output_.append(line);
  if (writing_) return;
  // What the socket takes at once needs no fiber.
  if (!write_some() || output_.empty()) return;
  writing_ = true;
  loop_.spawn("qmp writer", [this] { write_out(); });
}

// False: the client is gone.
bool Session::write_some() {
  while (!output_.empty()) {
    const ssize_t n =
        ::send(fd_.get(), output_.data(), output_.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n > 0) {
      output_.erase(0, static_cast<size_t>(n));
    } else if (n < 0 && errno == EAGAIN) {
      return true;
    } else if (n < 0 && errno != EINTR) {
      cut();
      return false;
    }
  }
  return true;
}

void Session::write_out() {
  while (!broken_ && !output_.empty()) {
    const size_t before = output_.size();
    if (!wait_writable(base::Clock::now() + limits_.stall)) {
      if (!broken_) base::log_warning("control socket: a client reads no answers, it is cut off");
      cut();
      break;
    }
    if (!write_some()) break;
    if (output_.size() != before) {
      const std::lock_guard lock(mutex_);
      written_.notify_all();
    }
  }
  const std::lock_guard lock(mutex_);
  writing_ = false;
  written_.notify_all();
}

bool Session::wait_writable(base::Clock::time_point deadline) {
  Deadline until(loop_, deadline);
  (void)base::io::poll(fd_.get(), POLLOUT, &until.source());
  return !until.source().cancelled() && !broken_;
}

// False: it is not all out by then, and will not be.
bool Session::drain(base::Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  while (writing_ && !broken_) {
    if (!written_.wait_until(lock, deadline, "a control client to read")) return false;
  }
  return !broken_;
}

// Both directions: whoever waits for the socket wakes.
void Session::cut() noexcept {
  broken_ = true;
  output_.clear();
  ::shutdown(fd_.get(), SHUT_RDWR);
}

}  // namespace minivmm::control::qmp
