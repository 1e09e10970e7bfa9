// SPDX-License-Identifier: Apache-2.0
// One client of the bare server: a thread that receives a batch of requests, does the I/O of each
// and answers with one send. The ways of doing each step are options, to be measured against each
// other. Not a server for data that matters: a request out of range ends the connection.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "base/unique_fd.h"
#include "nbd_wire.h"
#include "ring.h"

namespace minivmm::bench {

enum class BareReceive { kBlock, kEpoll, kRing };
enum class BareIo { kPread, kNowait, kRing, kMapped, kNone };
enum class BareSend { kJoined, kGathered, kRing };

struct BareOptions {
  BareReceive receive = BareReceive::kBlock;
  BareIo io = BareIo::kPread;
  BareSend send = BareSend::kJoined;
  unsigned spin_us = 0;  // poll the socket this long before sleeping
  // Requests answered by one send. More are left for the next: client and server then work at the
  // same time instead of in turns.
  unsigned max_batch = 8;
};

// The served file; shared by all connections.
struct BareFile {
  int fd = -1;
  std::uint64_t size = 0;
  char* mapped = nullptr;  // for BareIo::kMapped
};

class BareConnection {
 public:
  BareConnection(base::UniqueFd socket, const BareFile& file, const BareOptions& options);

  // Serves until the client leaves. Throws base::Error on a socket or file error.
  void serve();

 private:
  struct Pending {
    NbdRequest request;
    const char* payload = nullptr;  // of a write, in in_
    char* data = nullptr;           // of a read, in out_
    std::uint32_t error = 0;
  };

  bool receive();
  std::int64_t receive_spinning();
  std::int64_t receive_by_ring();
  bool wait_readable();
  void compact();

  bool take_batch();
  void plan_replies();
  void do_io();
  void do_io_by_ring();
  void do_one(Pending& p);
  void reply();
  void reply_gathered();

  base::UniqueFd socket_;
  BareFile file_;
  BareOptions options_;
  base::UniqueFd epoll_;
  std::unique_ptr<Ring> ring_;

  std::vector<char> in_;
  std::size_t begin_ = 0;  // first unparsed byte of in_
  std::size_t end_ = 0;
  std::vector<char> out_;
  std::size_t out_size_ = 0;
  std::size_t ring_send_ = 0;  // bytes of out_ that go with the next ring submission
  std::vector<Pending> batch_;
  std::vector<iovec> iov_;
  bool open_ = true;
};

}  // namespace minivmm::bench
