// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/unflushed.h"

#include "block/protocols/nbd/command.h"

namespace minivmm::block {
namespace {

// What a record costs beside its data.
constexpr uint64_t kRecordBytes = 256;

uint64_t bytes_of(const UnflushedLog::Record& record) noexcept {
  return record.data.size() + kRecordBytes;
}

}  // namespace

UnflushedLog::Records UnflushedLog::prepare(const NbdCommand& command, base::Buffer data) {
  auto record = std::make_shared<Record>();
  record->command = command;
  record->data = std::move(data);
  record->command.data = record->data.data();
  record->command.unflushed = nullptr;
  Records out;
  out.push_back(std::move(record));
  return out;
}

void UnflushedLog::add(Records& one) noexcept {
  const std::lock_guard lock(mutex_);
  one.front()->number = next_++;
  bytes_ += bytes_of(*one.front());
  records_.splice(records_.end(), one);
}

uint64_t UnflushedLog::mark() const {
  const std::lock_guard lock(mutex_);
  return next_;
}

void UnflushedLog::flushed(uint64_t mark) {
  Records gone;
  const std::lock_guard lock(mutex_);
  auto end = records_.begin();
  while (end != records_.end() && (*end)->number < mark) bytes_ -= bytes_of(**end++);
  gone.splice(gone.end(), records_, records_.begin(), end);
}

uint64_t UnflushedLog::bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

bool UnflushedLog::empty() const {
  const std::lock_guard lock(mutex_);
  return records_.empty();
}

std::vector<std::shared_ptr<UnflushedLog::Record>> UnflushedLog::records() const {
  const std::lock_guard lock(mutex_);
  return {records_.begin(), records_.end()};
}

}  // namespace minivmm::block
