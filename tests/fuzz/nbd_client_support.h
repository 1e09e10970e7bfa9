// SPDX-License-Identifier: Apache-2.0
// The server's side of the fuzz target nbd_client: a listener, and one client's conversation by
// the steps of the input. On the fuzzer's own thread.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/unique_fd.h"
#include "nbd_message.h"

namespace minivmm::nbd {

// Sent by no server here, whatever the input says.
inline constexpr std::byte kNeverSent{0x5a};

class Listener {
 public:
  Listener();
  const std::string& path() const { return path_; }
  int fd() const { return socket_.get(); }
  // Empty where nobody waits.
  base::UniqueFd accept();

 private:
  std::string path_;
  base::UniqueFd socket_;
};

// What is told of the export.
struct Terms {
  uint64_t size = 1 << 20;
  uint16_t flags = 0x0c6d;
  bool structured = true;
  bool contexts = true;
};

// What the conversations of one input share.
struct Script {
  Input input;
  bool good_at_last = false;
  Terms terms{};         // a good server says the same again
  bool settled = false;  // a client has heard them
  unsigned steps = 0;
};

class Conversation {
 public:
  // `finished` is readable when the client has ended.
  Conversation(base::UniqueFd socket, int finished, Script& script)
      : socket_(std::move(socket)), finished_(finished), script_(script) {}

  void run(bool enter_first);

 private:
  struct Request {
    uint16_t type;
    uint64_t cookie, offset;
    uint32_t length;
  };

  void step();
  void greet();
  void enter(const Terms& terms, bool by_name);
  void answer_option(uint32_t type, const Message& data, int bias = 0);
  void tell_export(const Terms& terms);
  void settle(const Terms& terms);
  bool take();
  bool serve_one();
  void be_good();
  void simple();
  void data_chunk();
  void hole_chunk();
  void extents_chunk();
  void error_chunk();
  void any_chunk();
  Request which();
  void chunk(const Request& to, uint16_t flags, uint16_t type, const Message& payload,
             int bias = 0);

  void send(const Message& message);
  bool receive(size_t size);
  // Nothing came for a while, or the client has left.
  bool wait_for_bytes();

  base::UniqueFd socket_;
  const int finished_;
  Script& script_;
  bool open_ = true;
  bool greeted_ = false;
  bool transmits_ = false;
  bool structured_ = false;
  bool patient_ = false;  // waits for what surely comes
  bool waited_ = false;   // in vain, and nothing was said since
  uint32_t option_ = 0;
  std::vector<uint8_t> in_;
  std::vector<Request> requests_;
};

}  // namespace minivmm::nbd
