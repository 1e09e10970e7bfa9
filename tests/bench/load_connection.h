// SPDX-License-Identifier: Apache-2.0
// One NBD connection of the load generator: keeps up to `depth` requests in flight. All requests
// that became possible since the last turn leave in one send; one receive takes all replies that
// are there. Used by one thread.
#pragma once

#include <string>
#include <sys/uio.h>

#include <cstdint>
#include <vector>

#include "base/unique_fd.h"
#include "histogram.h"
#include "load_plan.h"
#include "nbd_handshake.h"
#include "nbd_wire.h"

namespace minivmm::bench {

struct LoadStats {
  Histogram latency;
  std::uint64_t errors = 0;      // error replies
  std::uint64_t mismatches = 0;  // blocks that did not hold what was written
  std::uint64_t sends = 0;
  std::uint64_t receives = 0;
};

class LoadConnection {
 public:
  // `socket` has done its handshake. `model` may be null: then nothing is verified.
  LoadConnection(base::UniqueFd socket, const NbdExport& what, LoadPlan plan,
                 std::size_t block_size, unsigned depth, LoadModel* model);

  int fd() const { return socket_.get(); }
  bool idle() const { return free_.size() == slots_.size(); }
  bool wants_to_send() const { return next_iov_ < iov_.size(); }
  LoadPlan& plan() { return plan_; }
  LoadStats& stats() { return stats_; }

  // Queues as many requests as depth allows.
  void fill(std::uint64_t now);
  // Sends what the socket takes; the rest stays queued.
  void send();
  // Receives once. With `wait` sleeps until something comes; else returns false when nothing is
  // there. Throws base::Error when the server ends, stays silent or breaks the protocol.
  bool receive(bool wait);
  // Tells the server that we leave.
  void disconnect();

 private:
  struct Slot {
    LoadOp op;
    std::uint64_t start = 0;
    bool failed = false;
    char header[kRequestSize] = {};
    std::vector<char> data;  // verifying: what is written or was read; else unused
  };

  void queue(std::uint32_t index, const LoadOp& op, std::uint64_t now);
  void parse(std::uint64_t now);
  std::size_t parse_header(const char* p, std::size_t size, std::uint64_t now);
  std::size_t parse_simple(const char* p, std::uint64_t now);
  std::size_t parse_chunk(const char* p, std::size_t size, std::uint64_t now);
  void begin_data(std::uint32_t slot, std::size_t at, std::size_t length, bool last);
  void take_data(const char* p, std::size_t size, std::uint64_t now);
  void complete(std::uint32_t slot, std::uint64_t now);
  std::uint32_t slot_of(std::uint64_t cookie) const;

  base::UniqueFd socket_;
  bool structured_;
  LoadPlan plan_;
  std::size_t block_size_;
  LoadModel* model_;
  LoadStats stats_;

  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::vector<bool> in_flight_;
  std::vector<char> pattern_;  // what a load that is not verified writes

  std::vector<iovec> iov_;  // queued, [next_iov_, end)
  std::size_t next_iov_ = 0;

  std::vector<char> in_;
  std::size_t in_size_ = 0;
  // Reply data that is still to come, without a header in between.
  std::size_t data_left_ = 0;
  std::size_t data_at_ = 0;
  std::uint32_t data_slot_ = 0;
  bool data_last_ = false;
};

}  // namespace minivmm::bench
