// SPDX-License-Identifier: Apache-2.0
// The host side of the serial port: carries the guest's output to a descriptor or callback and what
// is typed to the UART. Owned by the machine. Two threads (one each way), so that an output nobody
// reads never stops a vCPU or the input.
//
// Output waits in a ring. While it is full the UART says "busy", and a guest that polls loses
// nothing; once the reader has taken nothing for a second, bytes are dropped and counted instead,
// so that a guest is not held up for ever by a pipe that nobody reads. A guest writes byte by byte:
// what follows a first byte is collected for a moment, since waking a thread costs more than a
// byte's exit.
#pragma once

#include <string_view>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "vmm/machine.h"
#include "vmm/serial.h"
#include "vmm/terminal.h"

namespace minivmm::vmm {

class Console final : public SerialOutput {
 public:
  static constexpr size_t kRingBytes = 65536;

  // `quit` is called (on the input thread) for Ctrl-A x on a terminal (or with
  // SerialConfig::escape).
  // `confine`: its threads get a filter of system calls.
  Console(const SerialConfig& config, std::function<void()> quit, bool confine = false);
  ~Console() override;
  Console(const Console&) = delete;
  Console& operator=(const Console&) = delete;

  // Before start(). The UART must outlive the Console's threads, that is: call stop() first.
  void attach(Serial& serial);
  // Makes a terminal raw. Before the guest runs. Throws base::Error.
  void open();
  // Starts the threads, with open() if that was not done; what the guest wrote until then waits.
  // Throws std::system_error.
  void start();
  // Writes out what waits (at most a second), ends the threads, gives the terminal back. Again: no
  // effect.
  void stop() noexcept;

  // SerialOutput.
  bool ready() override;
  void put(std::span<const std::byte> bytes) override;

  // Queues input. Throws base::Error(ENOBUFS) if more than 64 KiB would wait.
  void type(std::string_view text);
  uint64_t dropped() const noexcept { return dropped_.load(std::memory_order_relaxed); }

 private:
  using Clock = std::chrono::steady_clock;

  void output_loop();
  void input_loop();
  bool write_out(std::span<const std::byte> bytes);
  void tell_transmitter();
  void end_thread(std::thread& thread, const bool& done, std::chrono::milliseconds grace);
  bool take_input(std::vector<std::byte>& pending);
  void filter_escape(std::vector<std::byte>& bytes);
  void wake_input() noexcept;

  const SerialConfig config_;
  const bool confine_;
  const std::function<void()> quit_;
  Serial* serial_ = nullptr;
  base::UniqueFd input_wake_;
  std::unique_ptr<RawTerminal> terminal_;
  std::thread output_thread_;
  std::thread input_thread_;
  std::atomic<bool> stopping_{false};
  std::atomic<bool> give_up_{false};  // the output thread must end though bytes wait
  std::atomic<uint64_t> dropped_{0};
  bool escape_seen_ = false;  // input thread only

  std::mutex mutex_;
  std::condition_variable changed_;
  // Below: protected by mutex_.
  std::vector<std::byte> ring_;
  size_t ring_head_ = 0;
  size_t ring_count_ = 0;
  bool output_done_ = false;
  bool input_done_ = false;
  bool busy_reported_ = false;  // ready() said no since the last drain
  bool collecting_ = false;     // the output thread comes back by itself
  Clock::time_point last_progress_;
  std::vector<std::byte> typed_;
};

}  // namespace minivmm::vmm
