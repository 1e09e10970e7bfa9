// SPDX-License-Identifier: Apache-2.0
// One request of a client from its admission until its reply has been sent. Owned by the fiber
// that runs it, then by the reply queue; recycled through the loop's pool.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/pages.h"
#include "block/graph/loan.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd {

struct InputBlock;

struct Request {
  // A part of the reply: a header and bytes that follow it.
  struct Piece {
    std::array<std::byte, wire::kMaxChunkHead> header;
    uint32_t header_size = 0;
    uint32_t data_size = 0;
    const std::byte* data = nullptr;
    size_t at = 0;  // where `data` lay in the buffer, while the request is shed
  };

  wire::Request head;
  // What a BLOCK_STATUS is to tell of what was agreed on: a mask over the contexts.
  uint32_t contexts = 0;
  uint64_t charge = 0;  // bytes taken from the client's account
  // The next of a group of adjacent requests, of the reply queue, or of the pool's list.
  Request* next = nullptr;

  // What a READ fills, what a WRITE brought (unless it lies in `block`), and the texts and tables
  // of replies.
  base::Pages buffer;
  std::byte* payload = nullptr;  // of a WRITE
  InputBlock* block = nullptr;   // where `payload` lies, if not in `buffer`; held until the end

  // What a READ sends from where the node has it, instead of the buffer.
  block::Loan loan;

  Piece reply;
  std::vector<Piece> more;  // further parts, in order
  // A complete reply of what the node says, in the buffer or lent: the node can be asked again.
  bool rereadable = false;
  wire::ErrorCode error = wire::ErrorCode::kNone;  // of an error's reply
  // It waits to be sent without its data, which have to be read first.
  bool bare = false;
  // It waits to be sent without its memory, and without its charge.
  bool shed = false;
  // Nothing is left of that reply: the request is run again.
  bool redo = false;
  // What was lent could not be sent: it is read to be sent.
  bool no_loan = false;

  wire::Command command() const noexcept { return static_cast<wire::Command>(head.type); }
  bool is_read() const noexcept { return command() == wire::Command::kRead; }
  // The reply stays, without its data.
  void end_loan() noexcept {
    loan.give_back();
    reply.data = nullptr;
    reply.at = 0;
    bare = true;
  }
  bool has(wire::CommandFlag flag) const noexcept { return (head.flags & flag) != 0; }
  uint64_t end() const noexcept { return head.offset + head.length; }
};

}  // namespace minivmm::nbd
