// SPDX-License-Identifier: Apache-2.0
#include "block/filters/fault.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"
#include "block/graph/opening.h"

namespace minivmm::block {

FaultNode::FaultNode(const NodeConfig& config, std::shared_ptr<Node> file, FaultRule rule)
    : FilterNode(config, "fault", std::move(file)), rule_(rule) {}

void FaultNode::apply(FaultRule::Op op, uint64_t offset, uint64_t length) {
  if (rule_.op != FaultRule::kAny && rule_.op != op) return;
  const bool anywhere = op == FaultRule::kFlush;
  const bool before = offset < rule_.offset && rule_.offset - offset >= length;
  const bool behind = offset >= rule_.offset && offset - rule_.offset >= rule_.length;
  if (!anywhere && (before || behind)) return;
  const uint64_t number = seen_.fetch_add(1, std::memory_order_relaxed);
  if (number < rule_.after) return;
  if (rule_.count != 0 && number - rule_.after >= rule_.count) return;
  if (rule_.delay.count() > 0) base::io::sleep_for(rule_.delay);
  if (rule_.err != 0) {
    throw base::errno_error(rule_.err, fmt::format("{}: injected fault", describe()));
  }
}

void FaultNode::driver_read(uint64_t offset, IoSpan to) {
  apply(FaultRule::kRead, offset, to.bytes());
  FilterNode::driver_read(offset, to);
}

void FaultNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  apply(FaultRule::kWrite, offset, from.bytes());
  FilterNode::driver_write(offset, from, flags);
}

void FaultNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  apply(FaultRule::kZero, offset, length);
  FilterNode::driver_write_zeroes(offset, length, flags);
}

void FaultNode::driver_discard(uint64_t offset, uint64_t length) {
  apply(FaultRule::kDiscard, offset, length);
  FilterNode::driver_discard(offset, length);
}

void FaultNode::driver_flush() {
  apply(FaultRule::kFlush, 0, 0);
  FilterNode::driver_flush();
}

std::shared_ptr<Node> open_fault(Opening& opening, const NodeConfig& config, Options& options) {
  FaultRule rule;
  rule.op = static_cast<FaultRule::Op>(options.take_choice(
      "op", {"read", "write", "zero", "discard", "flush", "any"}, FaultRule::kAny));
  rule.offset = options.take_size("offset").value_or(0);
  rule.length = options.take_size("length").value_or(~uint64_t{0});
  rule.after = options.take_uint("after", 0, 0, UINT64_MAX);
  rule.count = options.take_uint("count", 0, 0, UINT64_MAX);
  constexpr int kErrnos[] = {EIO, ENOSPC, EACCES, EDQUOT, ETIMEDOUT, ENOMEM, ENOTSUP, 0};
  rule.err = kErrnos[options.take_choice(
      "errno", {"EIO", "ENOSPC", "EACCES", "EDQUOT", "ETIMEDOUT", "ENOMEM", "ENOTSUP", "none"}, 0)];
  rule.delay = std::chrono::nanoseconds(
      static_cast<int64_t>(options.take_uint("delay-ns", 0, 0, 3'600'000'000'000)));
  auto file = opening.open_child(options, "file", config.read_only);
  return std::make_shared<FaultNode>(config, std::move(file), rule);
}

}  // namespace minivmm::block
