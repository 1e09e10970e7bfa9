// SPDX-License-Identifier: Apache-2.0
#include "fuse/mount_state.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"

namespace minivmm::fuse {
namespace {

using base::Clock;
using std::chrono::milliseconds;

// Even a stop that may take no time tries to end well.
constexpr milliseconds kLeastGrace{250};
// For collecting what is stuck, from loops that are not.
constexpr milliseconds kInquiry{1000};
constexpr size_t kMostStuckLines = 16;

Appearance appearance_of(const MountOptions& options) {
  return {options.mode & 0777, options.uid.value_or(::geteuid()),
          options.gid.value_or(::getegid())};
}

}  // namespace

Mount::State::State(base::LoopGroup& loops, std::string mountpoint, const MountOptions& options)
    : loops_(loops), given_path_(std::move(mountpoint)), options_(options) {}

void Mount::State::start() {
  if (phase_ != Phase::kNew) throw base::Error(EINVAL, given_path_ + ": a mount starts once");
  base::Pool& pool = base::Pool::errands();
  mountpoint_ = pool.run([this] { return prepare_mountpoint(given_path_); });
  try {
    mount();
  } catch (...) {
    pool.run([this] { undo_mount(); });
    throw;
  }
  phase_ = Phase::kMounted;
  serving_ = channels_.size();
  for (const auto& channel : channels_) {
    channel->loop().post("FUSE reader",
                         [self = shared_from_this(), &channel] { self->serve(*channel); });
  }
}

void Mount::State::mount() {
  std::vector<base::UniqueFd> devices;
  // Whole: a loop's filter does not even tell who this process is.
  base::Pool::errands().run([&] {
    session_ = std::make_unique<Session>(files_, appearance_of(options_));
    session_->mount(mountpoint_.path, options_.allow_other);
    for (size_t i = 0; i < loops_.size(); ++i) devices.push_back(session_->clone_device());
  });
  const std::lock_guard lock(channels_mutex_);
  for (size_t i = 0; i < loops_.size(); ++i) {
    base::EventLoop& loop = loops_.loop(i);
    channels_.push_back(std::make_unique<Channel>(loop, std::move(devices[i]), *session_));
    session_->set_channel(loop, *channels_.back());
  }
}

void Mount::State::undo_mount() noexcept {
  const std::lock_guard lock(channels_mutex_);
  channels_.clear();
  if (session_) session_->abandon_mount();
  session_.reset();
  restore_mountpoint(mountpoint_);
}

void Mount::State::serve(Channel& channel) {
  if (channel.serve()) lost();
  channel.wait_until_idle();
  channel.close_device();
  if (serving_.fetch_sub(1) == 1) all_idle_.set();
}

// The file system was unmounted or its connection aborted, not by us. Every channel notices.
void Mount::State::lost() {
  Phase expected = Phase::kMounted;
  if (!phase_.compare_exchange_strong(expected, Phase::kLost)) return;
  base::log_warning("{}: was unmounted by somebody else; its files are not served any more",
                    given_path_);
  if (on_unmounted_) on_unmounted_();
}

void Mount::State::remove_file(const std::string& name, Clock::time_point deadline,
                               bool only_unused) {
  const std::shared_ptr<File> file = files_.remove(name, only_unused);
  if (!file) throw base::Error(ENOENT, fmt::format("FUSE: there is no file '{}'", name));
  const auto late = [&](const char* what) {
    return base::Error(ETIMEDOUT,
                       fmt::format("{}: '{}' is not shown any more, but {}; it is closed "
                                   "when that has ended",
                                   given_path_, name, what));
  };
  // Where requests hang, the last release closes it.
  if (!file->shut(deadline)) throw late("requests are in flight");
  deadline = std::max(deadline, Clock::now() + kLeastGrace);
  if (!within(deadline, "FUSE close", [file] { file->close(); })) throw late("it is being flushed");
}

bool Mount::State::still_mounted() const { return is_mount_of_this_process(mountpoint_.path); }

// An errand. The file system is served meanwhile: the kernel may write back through it.
void Mount::State::unmount_blocking() {
  if (still_mounted() && !unmount(mountpoint_.path)) {
    base::log_warning(
        "{}: in use (`fuser -vm {}` shows by whom); it is detached, and its users get "
        "errors from now on",
        given_path_, given_path_);
    sync_mount(mountpoint_.path);
    session_->abandon_mount();
    // libfuse leaves a mount whose connection was aborted as it is.
    if (still_mounted()) detach(mountpoint_.path);
  }
  session_->abandon_mount();  // now only closes its descriptor
  restore_mountpoint(mountpoint_);
}

// Runs `work` as a fiber; false if it has not ended by the deadline (it goes on). Rethrows.
bool Mount::State::within(Clock::time_point deadline, const char* name,
                          std::function<void()> work) {
  struct Step {
    base::Event done;
    std::exception_ptr error;
  };
  auto step = std::make_shared<Step>();
  base::EventLoop::current()->spawn(
      name, [self = shared_from_this(), step, work = std::move(work)]() mutable {
        try {
          work();
        } catch (...) {
          step->error = std::current_exception();
        }
        work = nullptr;
        step->done.set();
      });
  if (!step->done.wait_until(deadline)) return false;
  if (step->error) std::rethrow_exception(step->error);
  return true;
}

std::vector<std::string> Mount::State::stop(Clock::time_point deadline) {
  std::vector<std::string> troubles;
  const Phase before = phase_.exchange(Phase::kStopped);
  if (before == Phase::kStopped) return troubles;
  deadline = std::max(deadline, Clock::now() + kLeastGrace);
  if (before != Phase::kNew) {
    try {
      if (!within(deadline, "FUSE unmount",
                  [this] { base::Pool::errands().run([this] { unmount_blocking(); }); })) {
        troubles.push_back(given_path_ + ": unmounting has not ended");
      }
    } catch (const std::exception& e) {
      troubles.emplace_back(e.what());
    }
    stop_channels(deadline, troubles);
  }
  close_files(deadline, troubles);
  return troubles;
}

void Mount::State::stop_channels(Clock::time_point deadline, std::vector<std::string>& troubles) {
  for (const auto& channel : channels_) {
    channel->loop().post("FUSE stop",
                         [self = shared_from_this(), &channel] { channel->stop_reading(); });
  }
  deadline = std::max(deadline, Clock::now() + kLeastGrace);
  const bool idle = all_idle_.wait_until(deadline);
  if (!idle) abandon_channels(troubles);
  // Last, because it may wait for an answer of theirs.
  if (!session_->invalidator()->stop(Clock::now() + kLeastGrace) && idle) {
    troubles.push_back(given_path_ + ": the kernel still holds pages of a mapped file");
  }
}

// Requests hang. Their callers are let go: the kernel fails what is unanswered once the device is
// closed. The requests themselves go on, and keep this object.
void Mount::State::abandon_channels(std::vector<std::string>& troubles) {
  struct Inquiry {
    std::mutex mutex;
    std::vector<std::string> stuck;
    size_t outstanding = 0;
    base::Event answered;
  };
  auto inquiry = std::make_shared<Inquiry>();
  inquiry->outstanding = channels_.size();
  for (const auto& channel : channels_) {
    channel->loop().post("FUSE stop", [self = shared_from_this(), &channel, inquiry] {
      channel->close_device();
      const std::lock_guard lock(inquiry->mutex);
      for (std::string& line : channel->describe_requests(kMostStuckLines)) {
        inquiry->stuck.push_back(self->given_path_ + ": " + line);
      }
      if (--inquiry->outstanding == 0) inquiry->answered.set();
    });
  }
  if (!inquiry->answered.wait_until(Clock::now() + kInquiry)) {
    troubles.push_back(given_path_ + ": an I/O loop does not answer");
  }
  const std::lock_guard lock(inquiry->mutex);
  troubles.insert(troubles.end(), inquiry->stuck.begin(), inquiry->stuck.end());
}

void Mount::State::close_files(Clock::time_point deadline, std::vector<std::string>& troubles) {
  deadline = std::max(deadline, Clock::now() + kLeastGrace);
  for (const std::shared_ptr<File>& file : files_.all()) {
    (void)files_.remove(file->name());
    const std::string where = fmt::format("{}: '{}': ", given_path_, file->name());
    try {
      if (!file->shut(deadline)) {
        troubles.push_back(where + "not closed: requests are in flight");
      } else if (!within(deadline, "FUSE close", [file] { file->close(); })) {
        troubles.push_back(where + "flushing has not ended");
      }
    } catch (const std::exception& e) {
      troubles.push_back(where + e.what());
    }
  }
}

std::vector<std::string> Mount::State::describe() const {
  static constexpr const char* kNames[] = {"not mounted yet", "mounted",
                                           "unmounted by somebody else", "stopped"};
  uint64_t requests = 0;
  uint64_t in_flight = 0;
  {
    const std::lock_guard lock(channels_mutex_);
    for (const auto& channel : channels_) {
      requests += channel->counters().requests.load(std::memory_order_relaxed);
      in_flight += channel->counters().in_flight.load(std::memory_order_relaxed);
    }
  }
  std::vector<std::string> out{fmt::format("FUSE {}: {}, {} requests so far, {} in flight",
                                           given_path_, kNames[static_cast<size_t>(phase_.load())],
                                           requests, in_flight)};
  for (std::string& line : files_.describe()) out.push_back(std::move(line));
  return out;
}

}  // namespace minivmm::fuse
