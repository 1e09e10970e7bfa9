// SPDX-License-Identifier: Apache-2.0
// One command to an NBD server, as the node makes it and a connection runs it.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "block/protocols/nbd/unflushed.h"

namespace minivmm::block {

struct NbdCommand {
  enum class Kind { kRead, kWrite, kZero, kTrim, kFlush, kCache, kStatus };
  Kind kind = Kind::kRead;
  uint64_t offset = 0;
  uint64_t length = 0;
  void* data = nullptr;  // of a READ or WRITE; a WRITE's are only read
  uint32_t flags = 0;    // LIBNBD_CMD_FLAG_*
  // Where to add `record` at the moment in which the server acknowledges it; may be null.
  UnflushedLog* unflushed = nullptr;
  UnflushedLog::Records* record = nullptr;
  // Of kStatus: the first extent.
  uint64_t status_length = 0;
  uint32_t status_flags = 0;
};

struct UnflushedLog::Record {
  NbdCommand command;
  base::Buffer data;
  uint64_t number = 0;
};

}  // namespace minivmm::block
