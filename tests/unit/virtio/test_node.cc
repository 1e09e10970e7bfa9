// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/virtio/test_node.h"

#include <algorithm>
#include <cstring>

namespace minivmm::virtio {

TestNode::TestNode(uint64_t size, bool read_only, const block::Limits& limits)
    : Node("disk0", "test", read_only), data_(size) {
  held_.set();
  set_size(size);
  set_limits(limits);
}

void TestNode::on_call(std::function<void(const Call&)> hook) {
  const std::lock_guard lock(mutex_);
  hook_ = std::move(hook);
}

void TestNode::grow(uint64_t size) {
  const std::lock_guard lock(mutex_);
  data_.resize(size);
  set_size(size);
}

std::vector<TestNode::Call> TestNode::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

std::vector<TestNode::Call> TestNode::calls(Kind kind) const {
  std::vector<Call> all = calls();
  std::erase_if(all, [&](const Call& call) { return call.kind != kind; });
  return all;
}

void TestNode::forget_calls() {
  const std::lock_guard lock(mutex_);
  calls_.clear();
}

std::vector<std::byte> TestNode::content(uint64_t offset, uint64_t length) const {
  const std::lock_guard lock(mutex_);
  const auto first = data_.begin() + static_cast<ptrdiff_t>(offset);
  return {first, first + static_cast<ptrdiff_t>(length)};
}

void TestNode::begin(const Call& call) {
  std::function<void(const Call&)> hook;
  {
    const std::lock_guard lock(mutex_);
    calls_.push_back(call);
    hook = hook_;
  }
  ++waiting_;
  held_.wait();
  --waiting_;
  if (hook) hook(call);
}

void TestNode::driver_read(uint64_t offset, block::IoSpan to) {
  begin({Kind::kRead, offset, to.bytes(), false, false, to.count()});
  const std::lock_guard lock(mutex_);
  base::copy_to(to, 0, std::span(data_).subspan(offset, to.bytes()));
}

void TestNode::driver_write(uint64_t offset, block::IoSpan from, block::WriteFlags flags) {
  begin({Kind::kWrite, offset, from.bytes(), flags.fua, false, from.count()});
  const std::lock_guard lock(mutex_);
  base::copy_from(from, 0, std::span(data_).subspan(offset, from.bytes()));
}

void TestNode::driver_write_zeroes(uint64_t offset, uint64_t length, block::ZeroFlags flags) {
  begin({Kind::kZero, offset, length, flags.fua, flags.may_unmap, 0});
  const std::lock_guard lock(mutex_);
  std::memset(&data_[offset], 0, length);
}

void TestNode::driver_discard(uint64_t offset, uint64_t length) {
  begin({Kind::kDiscard, offset, length, false, false, 0});
  const std::lock_guard lock(mutex_);
  std::memset(&data_[offset], 0, length);
}

void TestNode::driver_flush() { begin({Kind::kFlush, 0, 0, false, false, 0}); }

}  // namespace minivmm::virtio
