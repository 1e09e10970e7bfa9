// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/validation.h"

#include "base/checked.h"

namespace minivmm::nbd {
namespace {

using wire::Command;
using wire::ErrorCode;

struct CommandRules {
  unsigned flags;    // allowed, besides FUA, which every command takes
  bool writes;       // refused on a read-only export
  bool has_payload;  // or brings one back: bounded by kMaxPayload
  ErrorCode past_end;
};

std::optional<CommandRules> rules_of(uint16_t type) noexcept {
  switch (static_cast<Command>(type)) {
    case Command::kRead:
      return CommandRules{wire::kDf, false, true, ErrorCode::kInval};
    case Command::kWrite:
      return CommandRules{wire::kPayloadLen, true, true, ErrorCode::kNoSpc};
    case Command::kTrim:
      return CommandRules{0, true, false, ErrorCode::kInval};
    case Command::kWriteZeroes:
      return CommandRules{wire::kNoHole | wire::kFastZero, true, false, ErrorCode::kNoSpc};
    case Command::kCache:
      return CommandRules{0, false, false, ErrorCode::kInval};
    case Command::kBlockStatus:
      return CommandRules{wire::kReqOne | wire::kPayloadLen, false, false, ErrorCode::kInval};
    case Command::kFlush:
      return CommandRules{0, false, false, ErrorCode::kInval};
    case Command::kDisc:
      break;  // has no reply, so nothing to refuse it with
  }
  return std::nullopt;
}

}  // namespace

std::optional<Refusal> refuse(const wire::Request& r, const RequestRules& rules) noexcept {
  const auto command = rules_of(r.type);
  if (!command) {
    // Only an experiment defines it, and whoever wants it has to be offered it first.
    constexpr uint16_t kResize = 8;
    return Refusal{ErrorCode::kInval,
                   r.type == kResize ? "RESIZE is not offered" : "unknown command"};
  }
  if ((r.flags & ~(command->flags | wire::kFua)) != 0) {
    return Refusal{ErrorCode::kInval, "a flag that the command does not have"};
  }
  const bool extended = rules.headers == wire::Headers::kExtended;
  if ((r.flags & wire::kPayloadLen) != 0 && !extended) {
    return Refusal{ErrorCode::kInval, "PAYLOAD_LEN needs extended headers"};
  }
  if ((r.flags & wire::kDf) != 0 && rules.headers == wire::Headers::kSimple) {
    return Refusal{ErrorCode::kInval, "DF needs structured replies"};
  }
  if (command->writes && !rules.writable) {
    return Refusal{ErrorCode::kPerm, "the export is read-only"};
  }
  const auto type = static_cast<Command>(r.type);
  if (type == Command::kWrite && extended && (r.flags & wire::kPayloadLen) == 0) {
    return Refusal{ErrorCode::kInval, "a WRITE without PAYLOAD_LEN"};
  }
  if (type == Command::kFlush) {
    if (r.offset == 0 && r.length == 0) return std::nullopt;
    return Refusal{ErrorCode::kInval, "FLUSH takes neither offset nor length"};
  }
  if (type == Command::kBlockStatus) {
    if (!rules.contexts) return Refusal{ErrorCode::kInval, "no metadata context was selected"};
    if (r.length == 0) return Refusal{ErrorCode::kInval, "the range is empty"};
  }
  if (command->has_payload && r.length > wire::kMaxPayload) {
    return Refusal{ErrorCode::kInval, "more than the maximum block size of 32 MiB"};
  }
  if (!base::range_fits(r.offset, r.length, rules.size)) {
    return Refusal{command->past_end, "the range reaches past the end of the export"};
  }
  return std::nullopt;
}

}  // namespace minivmm::nbd
