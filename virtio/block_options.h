// SPDX-License-Identifier: Apache-2.0
// What a user can choose about a virtio block device.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <functional>

namespace minivmm::virtio {

// What becomes of a request that fails on the host.
enum class ErrorAction : uint8_t {
  kReport,  // the guest gets the error
  kIgnore,  // the guest is told that it went well
  kStop,    // the request waits, and the guest with it, until somebody resumes it; then again
  kNoSpace  // kStop where there is no room left, kReport for the rest
};

// A request that failed on the host.
struct FailedRequest {
  bool read = false;
  bool no_space = false;
  // kReport, kIgnore or kStop.
  ErrorAction action = ErrorAction::kReport;
  std::string why;
};

struct BlockOptions {
  std::string name = "disk";          // stands in messages and state dumps
  std::string serial{};               // what the guest sees as the disk's id; at most 20 bytes
  bool read_only = false;             // also set if the handle cannot write
  bool write_cache = true;            // the guest's cache mode until it chooses another one
  uint32_t logical_block_size = 512;  // bytes, power of two, 512 to 32768
  uint32_t physical_block_size = 0;   // bytes, power of two >= logical; 0: what the disk prefers
  uint16_t num_queues = 1;            // 1 to 64
  uint16_t queue_size = 256;          // entries, power of two, 4 to 1024
  ErrorAction read_error = ErrorAction::kReport;
  ErrorAction write_error = ErrorAction::kReport;  // also of flushes, discards and zeroes
  // Called with what failed where a request begins to wait (kStop); on a fiber, must not wait.
  std::function<void(const std::string&)> on_stop{};
  // Called for each request that fails on the host, before anything is done about it; on a fiber,
  // must not wait.
  std::function<void(const FailedRequest&)> on_error{};
  // What drivers may use; off for tests of those that cannot.
  bool indirect = true;
  bool event_index = true;
  bool legacy = false;  // the virtio-mmio window is that of version 1
  // How long a queue may look for new requests before it sleeps. It adapts itself up to this limit;
  // 0 turns it off.
  std::chrono::microseconds poll_limit{8};
};

// Throws base::Error(EINVAL) that names the option and what it may be.
void check_options(const BlockOptions& options);

}  // namespace minivmm::virtio
