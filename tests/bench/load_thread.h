// SPDX-License-Identifier: Apache-2.0
// A thread of the load generator with its connections: one poll for all of them, or plain blocking
// receives when there is only one.
#pragma once

#include <string>

#include <cstdint>
#include <memory>
#include <vector>

#include "load_connection.h"
#include "load_model.h"
#include "nbd_socket.h"

namespace minivmm::bench {

struct LoadOptions {
  NbdAddress address;
  LoadKind kind = LoadKind::kRandRead;
  std::size_t block_size = 4096;
  unsigned depth = 1;
  unsigned connections = 1;
  unsigned threads = 1;
  double seconds = 1;
  double ramp = 0.1;        // seconds of load before the measurement
  std::uint64_t range = 0;  // bytes; 0: the whole export
  std::uint64_t seed = 1;
  bool verify = false;
  bool structured = false;
  bool spin = false;  // never sleep on the socket: the server's latency without our own wake-ups
};

struct LoadResult {
  LoadStats stats;
  std::uint64_t mismatches = 0;  // of the whole run, the re-check too
  double seconds = 0;
  double cpu_seconds = 0;
};

class LoadThread {
 public:
  // Connects. `index` of options.threads; each thread has its own part of the range.
  LoadThread(const LoadOptions& options, unsigned index);

  // Loads, measures, drains, re-checks when verifying, and leaves. Throws base::Error.
  LoadResult run();

 private:
  void load_until(std::uint64_t deadline);
  void drain();
  void recheck();
  void turn(bool may_fill);
  void wait_for_sockets();
  LoadStats take_stats();

  LoadOptions options_;
  std::unique_ptr<LoadModel> model_;
  std::vector<std::unique_ptr<LoadConnection>> connections_;
};

}  // namespace minivmm::bench
