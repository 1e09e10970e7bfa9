// SPDX-License-Identifier: Apache-2.0
// A file in memory for tests of the qcow2 driver: it can hold requests back, fail them, run full,
// and it remembers what was written and flushed when, so that a test can make every state that a
// power cut could have left.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "base/error.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

class TestFile final : public Node {
 public:
  enum class Op { kRead, kWrite, kDiscard, kFlush };

  TestFile() : Node("test-file", "test", false) {
    set_limits({.discard_granularity = 512, .can_discard = true, .can_write_zeroes = true});
  }

  // Called on the request's fiber before and after it is done; may suspend, `before` may throw.
  std::function<void(Op, uint64_t offset, uint64_t length)> before;
  std::function<void(Op, uint64_t offset, uint64_t length)> after;
  // Writes that would make the file larger fail with ENOSPC.
  std::atomic<uint64_t> most_bytes{~uint64_t{0}};

  std::vector<std::byte> content() {
    const std::lock_guard lock(mutex_);
    return data_;
  }
  void set_content(std::vector<std::byte> data) {
    const std::lock_guard lock(mutex_);
    data_ = std::move(data);
    set_size(data_.size());
  }

  // Ranges for which writeback was begun.
  std::vector<std::pair<uint64_t, uint64_t>> writebacks() {
    const std::lock_guard lock(mutex_);
    return writebacks_;
  }

  // --- The log ---
  void start_log() {
    const std::lock_guard lock(mutex_);
    start_ = data_;
    changes_.clear();
    flushes_.clear();
    logging_ = true;
  }
  // Advances with every event. Any thread.
  uint64_t now() const { return clock_.load(); }
  uint64_t tick() { return clock_.fetch_add(1) + 1; }

  // What a power cut at time `cut` may leave: all that was durable, and of the rest a random part,
  // sector by sector.
  std::vector<std::byte> after_power_cut(uint64_t cut, std::mt19937_64& random) {
    const std::lock_guard lock(mutex_);
    std::vector<std::byte> out = start_;
    const unsigned luck = static_cast<unsigned>(random() % 5);
    for (const Change& change : changes_) {
      if (change.began > cut) continue;
      if (durable(change, cut)) {
        apply(change, 0, change.length, out);
      } else if (luck == 4 || (luck != 0 && random() % 2 == 0)) {
        if (random() % 4 != 0) {
          apply(change, 0, change.length, out);
          continue;
        }
        // A disk writes sectors whole: some of them, in any order.
        for (uint64_t at = 0; at < change.length;) {
          const uint64_t end =
              std::min(change.length, ((change.offset + at) / 512 + 1) * 512 - change.offset);
          if (random() % 2 == 0) apply(change, at, end, out);
          at = end;
        }
      }
    }
    return out;
  }

 private:
  static constexpr uint64_t kNever = ~uint64_t{0};
  struct Change {
    uint64_t began = 0;
    uint64_t ended = kNever;
    uint64_t offset = 0;
    uint64_t length = 0;
    std::vector<std::byte> bytes;  // empty: zeroes
  };
  struct Flush {
    uint64_t began = 0;
    uint64_t ended = kNever;
  };

  bool durable(const Change& change, uint64_t cut) const {
    return std::any_of(flushes_.begin(), flushes_.end(), [&](const Flush& flush) {
      return change.ended < flush.began && flush.ended <= cut;
    });
  }
  static void apply(const Change& change, uint64_t from, uint64_t to, std::vector<std::byte>& out) {
    if (change.bytes.empty()) {  // a hole does not make the file longer
      to = std::min(to, out.size() > change.offset ? out.size() - change.offset : 0);
      if (from < to) std::memset(out.data() + change.offset + from, 0, to - from);
      return;
    }
    if (out.size() < change.offset + to) out.resize(change.offset + to);
    std::memcpy(out.data() + change.offset + from, change.bytes.data() + from, to - from);
  }

  void call(const std::function<void(Op, uint64_t, uint64_t)>& hook, Op op, uint64_t offset,
            uint64_t length) {
    if (hook) hook(op, offset, length);
  }

  // Applies and logs a change; returns its place in the log.
  size_t change(Change&& change) {
    const std::lock_guard lock(mutex_);
    change.began = tick();
    apply(change, 0, change.length, data_);
    set_size(data_.size());
    if (!logging_) return 0;
    changes_.push_back(std::move(change));
    return changes_.size();
  }
  void ended(size_t place) {
    const std::lock_guard lock(mutex_);
    if (place != 0) changes_[place - 1].ended = tick();
  }

  void driver_read(uint64_t offset, IoSpan to) override {
    call(before, Op::kRead, offset, to.bytes());
    {
      const std::lock_guard lock(mutex_);
      base::copy_to(to, 0, std::span(data_).subspan(offset, to.bytes()));
    }
    call(after, Op::kRead, offset, to.bytes());
  }
  void driver_write(uint64_t offset, IoSpan from, WriteFlags) override {
    call(before, Op::kWrite, offset, from.bytes());
    if (offset + from.bytes() > std::max(most_bytes.load(), size())) {
      throw base::Error(ENOSPC, "test file: full");
    }
    Change c{.offset = offset, .length = from.bytes(), .bytes = {}};
    c.bytes.resize(from.bytes());
    base::copy_from(from, 0, c.bytes);
    const size_t place = change(std::move(c));
    call(after, Op::kWrite, offset, from.bytes());
    ended(place);
  }
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags) override {
    call(before, Op::kWrite, offset, length);
    Change c{.offset = offset, .length = length, .bytes = {}};
    c.bytes.resize(length);
    const size_t place = change(std::move(c));
    call(after, Op::kWrite, offset, length);
    ended(place);
  }
  void driver_discard(uint64_t offset, uint64_t length) override {
    call(before, Op::kDiscard, offset, length);
    const size_t place = change({.offset = offset, .length = length, .bytes = {}});
    call(after, Op::kDiscard, offset, length);
    ended(place);
  }
  void driver_flush() override {
    call(before, Op::kFlush, 0, 0);
    const uint64_t began = tick();
    call(after, Op::kFlush, 0, 0);
    const std::lock_guard lock(mutex_);
    if (logging_) flushes_.push_back({began, tick()});
  }
  void driver_start_writeback(uint64_t offset, uint64_t length) noexcept override {
    const std::lock_guard lock(mutex_);
    writebacks_.emplace_back(offset, length);
  }
  void driver_truncate(uint64_t new_size) override {
    const std::lock_guard lock(mutex_);
    data_.resize(new_size);
    set_size(new_size);
  }

  std::mutex mutex_;
  std::vector<std::byte> data_;
  std::vector<std::byte> start_;
  std::vector<Change> changes_;
  std::vector<Flush> flushes_;
  std::vector<std::pair<uint64_t, uint64_t>> writebacks_;
  bool logging_ = false;
  std::atomic<uint64_t> clock_{1};
};

// A new image in a new TestFile. Fiber.
inline std::shared_ptr<TestFile> make_test_image(const qcow2::CreateOptions& options) {
  auto file = std::make_shared<TestFile>();
  Edge edge(file, "create", Permissions::format_file(true));
  qcow2::create_image(edge, options);
  return file;
}

// The qcow2 node on a file, without a graph. Fiber.
inline std::shared_ptr<Qcow2Node> open_test_image(std::shared_ptr<Node> file,
                                                  std::shared_ptr<Node> backing = nullptr,
                                                  bool read_only = false,
                                                  uint64_t l2_cache = 1 << 20,
                                                  std::shared_ptr<Node> data = nullptr) {
  qcow2::Header header;
  {
    Edge edge(file, "open", {0, Permissions::kWrite | Permissions::kResize});
    header = qcow2::read_header(edge);
    qcow2::require_supported(header);
  }
  const auto sizes =
      qcow2::choose_cache_sizes(header, std::nullopt, l2_cache, std::nullopt, std::nullopt);
  Qcow2Node::Children children{std::move(file), std::move(data), std::move(backing)};
  return std::make_shared<Qcow2Node>(NodeConfig{"disk", read_only}, std::move(children),
                                     std::move(header), sizes);
}

}  // namespace minivmm::block
