// SPDX-License-Identifier: Apache-2.0
#include "vmm/console.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "vmm/kick.h"
#include "vmm/thread_filter.h"

namespace minivmm::vmm {
namespace {

constexpr auto kStallLimit = std::chrono::seconds(1);
constexpr int kStallPoll = 1100;  // ms, a little longer
constexpr auto kStopLimit = std::chrono::seconds(1);
constexpr auto kInputGrace = std::chrono::milliseconds(100);
// Long for a byte's exit, short for an eye.
constexpr auto kCollect = std::chrono::microseconds(500);
// A pipe that polls writable takes at least PIPE_BUF bytes without blocking.
constexpr size_t kWriteChunk = 2048;
constexpr size_t kFifoRoom = 64;
constexpr std::byte kEscape{0x01};  // Ctrl-A

}  // namespace

Console::Console(const SerialConfig& config, std::function<void()> quit, bool confine)
    : config_(config), confine_(confine), quit_(std::move(quit)), ring_(kRingBytes) {
  input_wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!input_wake_) throw base::errno_error(errno, "serial: cannot make an eventfd");
}

Console::~Console() { stop(); }

void Console::attach(Serial& serial) {
  serial_ = &serial;
  serial.set_on_drained([this] { wake_input(); });
}

void Console::open() {
  install_kick_handler();
  terminal_ = std::make_unique<RawTerminal>(config_.in_fd);
  last_progress_ = Clock::now();
}

void Console::start() {
  if (!terminal_) open();
  const ServiceThreadSignals signals;
  output_thread_ = std::thread([this] { output_loop(); });
  input_thread_ = std::thread([this] { input_loop(); });
}

void Console::stop() noexcept {
  if (stopping_.exchange(true)) return;
  wake_input();
  end_thread(input_thread_, input_done_, kInputGrace);
  end_thread(output_thread_, output_done_, kStopLimit);
  terminal_.reset();
  if (dropped() != 0) base::log_warning("serial: {} bytes of output were dropped", dropped());
}

// Waits until the thread says `done`. After `grace` it may be inside a read or write that blocks (a
// reader that takes nothing, or another one that took what poll() had seen): the signal gets it
// out. Sent again in case it was just before the call.
void Console::end_thread(std::thread& thread, const bool& done, std::chrono::milliseconds grace) {
  if (!thread.joinable()) return;
  std::unique_lock lock(mutex_);
  changed_.notify_all();
  if (!changed_.wait_for(lock, grace, [&] { return done; })) {
    if (&thread == &output_thread_) give_up_.store(true);
    while (!done) {
      kick_thread(thread.native_handle());
      changed_.wait_for(lock, std::chrono::milliseconds(10), [&] { return done; });
    }
  }
  lock.unlock();
  thread.join();
}

bool Console::ready() {
  std::lock_guard lock(mutex_);
  // Drivers write a whole transmit FIFO after one look.
  if (ring_count_ + kFifoRoom <= kRingBytes) return true;
  if (Clock::now() - last_progress_ > kStallLimit) return true;
  busy_reported_ = true;
  return false;
}

void Console::put(std::span<const std::byte> bytes) {
  std::lock_guard lock(mutex_);
  if (ring_count_ == 0) last_progress_ = Clock::now();
  for (const auto byte : bytes) {
    if (ring_count_ == kRingBytes) {
      dropped_.fetch_add(1, std::memory_order_relaxed);
      continue;
    }
    ring_[(ring_head_ + ring_count_++) % kRingBytes] = byte;
  }
  if (!collecting_ || ring_count_ >= kWriteChunk) changed_.notify_all();
}

void Console::type(std::string_view text) {
  std::lock_guard lock(mutex_);
  if (typed_.size() + text.size() > kRingBytes) {
    throw base::Error(ENOBUFS, "serial: 64 KiB of input wait and the guest takes none");
  }
  const auto bytes = std::as_bytes(std::span(text));
  typed_.insert(typed_.end(), bytes.begin(), bytes.end());
  wake_input();
}

void Console::output_loop() {
  ::pthread_setname_np(::pthread_self(), "serial-out");
  // A callback may do anything.
  if (confine_ && !config_.on_output) confine_thread(ThreadKind::kSerial, "serial-out");
  std::array<std::byte, kWriteChunk> chunk;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return ring_count_ != 0 || stopping_.load(); });
    if (ring_count_ == 0 || give_up_.load()) break;
    const size_t n = std::min({chunk.size(), ring_count_, kRingBytes - ring_head_});
    std::copy_n(ring_.begin() + static_cast<ptrdiff_t>(ring_head_), n, chunk.begin());
    lock.unlock();
    const bool written = write_out(std::span(chunk).first(n));
    lock.lock();
    if (!written) dropped_.fetch_add(n, std::memory_order_relaxed);
    ring_head_ = (ring_head_ + n) % kRingBytes;
    ring_count_ -= n;
    last_progress_ = Clock::now();
    lock.unlock();
    tell_transmitter();
    lock.lock();
    collecting_ = true;
    changed_.wait_for(lock, kCollect,
                      [this] { return ring_count_ >= kWriteChunk || stopping_.load(); });
    collecting_ = false;
  }
  output_done_ = true;
  changed_.notify_all();
}

// A transmitter that was told to wait may look again.
void Console::tell_transmitter() {
  {
    const std::lock_guard lock(mutex_);
    if (!std::exchange(busy_reported_, false)) return;
  }
  serial_->output_ready();  // without our lock: the UART's comes before it
}

// False where the bytes are lost: no output, its reader is gone, or the machine gives up.
bool Console::write_out(std::span<const std::byte> bytes) {
  if (config_.on_output) {
    config_.on_output(bytes);
    return true;
  }
  if (config_.out_fd < 0) return true;  // nobody asked for it
  while (!bytes.empty()) {
    if (give_up_.load()) return false;
    pollfd wait{config_.out_fd, POLLOUT, 0};
    const int ready = ::poll(&wait, 1, kStallPoll);
    if (ready < 0) continue;  // EINTR: look at give_up_ again
    if (ready == 0) {
      // A transmitter that waits for an interrupt would never find out that ready() has given up.
      tell_transmitter();
      continue;
    }
    const ssize_t n = ::write(config_.out_fd, bytes.data(), bytes.size());
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (n < 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
  return true;
}

void Console::input_loop() {
  ::pthread_setname_np(::pthread_self(), "serial-in");
  if (confine_) confine_thread(ThreadKind::kSerial, "serial-in");
  std::vector<std::byte> pending;
  bool open = config_.in_fd >= 0;
  while (!stopping_.load()) {
    {
      std::lock_guard lock(mutex_);
      pending.insert(pending.end(), typed_.begin(), typed_.end());
      typed_.clear();
    }
    if (!pending.empty()) {
      const size_t taken = serial_->receive(pending);
      pending.erase(pending.begin(), pending.begin() + static_cast<ptrdiff_t>(taken));
    }
    // While the guest has not taken what is here, the descriptor is left alone: its writer waits.
    const bool read_more = open && pending.empty();
    std::array<pollfd, 2> fds{
        {{input_wake_.get(), POLLIN, 0}, {read_more ? config_.in_fd : -1, POLLIN, 0}}};
    if (::poll(fds.data(), fds.size(), -1) < 0) continue;
    if (fds[0].revents != 0) {
      uint64_t count = 0;
      (void)!::read(input_wake_.get(), &count, sizeof count);
    }
    if (fds[1].revents != 0) open = take_input(pending);
  }
  const std::lock_guard lock(mutex_);
  input_done_ = true;
  changed_.notify_all();
}

// False at the end of input.
bool Console::take_input(std::vector<std::byte>& pending) {
  std::array<std::byte, 1024> buffer;
  const ssize_t n = ::read(config_.in_fd, buffer.data(), buffer.size());
  if (n < 0) return errno == EINTR || errno == EAGAIN;
  if (n == 0) return false;
  std::vector<std::byte> bytes(buffer.begin(), buffer.begin() + n);
  if (terminal_->active() || config_.escape) filter_escape(bytes);
  pending.insert(pending.end(), bytes.begin(), bytes.end());
  return true;
}

// Ctrl-A x ends the machine, Ctrl-A Ctrl-A types one Ctrl-A, Ctrl-A and anything else types both.
void Console::filter_escape(std::vector<std::byte>& bytes) {
  std::vector<std::byte> out;
  for (const auto byte : bytes) {
    if (!escape_seen_) {
      if (byte == kEscape) {
        escape_seen_ = true;
      } else {
        out.push_back(byte);
      }
      continue;
    }
    escape_seen_ = false;
    if (byte == std::byte{'x'}) {
      quit_();
      continue;
    }
    out.push_back(kEscape);
    if (byte != kEscape) out.push_back(byte);
  }
  bytes = std::move(out);
}

void Console::wake_input() noexcept {
  const uint64_t one = 1;
  (void)!::write(input_wake_.get(), &one, sizeof one);
}

}  // namespace minivmm::vmm
