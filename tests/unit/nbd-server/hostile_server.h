// SPDX-License-Identifier: Apache-2.0
// An NBD server that says what a test tells it to: right up to some point, and then wrong.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "client.h"

namespace minivmm::nbd {

// A client's connection, as the server sees it. Everything has a time limit; where the client has
// gone, Gone is thrown.
class HostilePeer {
 public:
  struct Gone {};
  struct Option {
    uint32_t id = 0;
    Bytes data{};
  };
  struct Request {
    uint16_t flags = 0;
    uint16_t type = 0;
    uint64_t cookie = 0;
    uint64_t offset = 0;
    uint32_t length = 0;
    Bytes payload{};
  };
  // What enter() tells of the export.
  struct Terms {
    uint64_t size = 1 << 20;
    uint16_t flags = 0x0d;  // FLUSH, FUA
    bool structured = true;
    bool contexts = true;
    Bytes block_sizes{};  // three numbers, or nothing
  };

  // `socket` is the caller's.
  HostilePeer(int socket, unsigned number) : number_(number), socket_(socket) {}

  // The how many-th connection this is, from 0.
  unsigned number() const noexcept { return number_; }

  void send(const Bytes& bytes);
  Bytes receive(size_t size);
  // Until the client has left.
  void wait_for_end();

  void greet();
  Option option();
  void answer(const Option& to, uint32_t type, const Bytes& data = {});
  // The whole handshake as it should be.
  void enter(const Terms& terms);
  void enter() { enter(Terms{}); }

  Request request();
  void simple(const Request& to, uint32_t error = 0, const Bytes& data = {});
  void chunk(const Request& to, uint16_t type, const Bytes& payload, bool done = true);
  // Until the client leaves: requests of `type` by `answer`, others are said to be done.
  void answer_all(uint16_t type, const std::function<void(const Request&)>& answer);
  // As it should be, until the client leaves.
  void serve();

 private:
  const unsigned number_;
  const int socket_;
};

// Listens on a unix socket; `talk` is called for each connection, on a thread of its own.
class HostileServer {
 public:
  HostileServer(std::string path, std::function<void(HostilePeer&)> talk);
  HostileServer(const HostileServer&) = delete;
  HostileServer& operator=(const HostileServer&) = delete;
  ~HostileServer();

  std::string uri() const { return "nbd+unix:///?socket=" + path_; }
  unsigned connections() const noexcept { return connections_; }

 private:
  void accept_clients();

  const std::string path_;
  const std::function<void(HostilePeer&)> talk_;
  base::UniqueFd listener_;
  std::atomic<unsigned> connections_{0};
  std::thread thread_;
  std::vector<int> sockets_;  // of thread_, as the next; ours to shut down
  std::vector<std::thread> talks_;
};

}  // namespace minivmm::nbd
