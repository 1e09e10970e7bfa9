// SPDX-License-Identifier: Apache-2.0
// The checker itself: a checker that accepts everything would make the other tests worthless.
#include "tests/system/stress_check.h"

#include <cstring>

#include <gtest/gtest.h>

namespace minivmm::test {
namespace {

using probe::StressOp;

class StressCheckTest : public testing::Test {
 protected:
  static constexpr uint64_t kBlocks = 64;
  static constexpr uint64_t kLast = 500;

  StressCheckTest() : disk_(kBlocks * 4096) {
    check_.parameters.seed = 11;
    check_.parameters.blocks = kBlocks;
    check_.parameters.zeroes = true;
    check_.durable = check_.issued = kLast;
    check_.started_empty = true;
    for (uint64_t sequence = 1; sequence <= kLast; ++sequence) apply(sequence);
  }

  void apply(uint64_t sequence) {
    const auto request = probe::stress_request(check_.parameters, sequence);
    for (uint64_t at = request.block * 4096; at < (request.block + request.count) * 4096;
         at += 512) {
      if (request.op == StressOp::kWrite) {
        probe::fill_stamp(reinterpret_cast<uint64_t*>(&disk_[at]), {at, sequence, 1, 11});
      } else if (request.op == StressOp::kZero) {
        std::memset(&disk_[at], 0, 512);
      }
    }
  }

  std::vector<std::string> run() {
    return check_stress(check_, [this](uint64_t offset, std::span<std::byte> out) {
      std::memcpy(out.data(), &disk_[offset], out.size());
    });
  }

  // A block whose last change is a write, and the one before it too.
  uint64_t last_write() const {
    for (uint64_t sequence = kLast;; --sequence) {
      if (probe::stress_request(check_.parameters, sequence).op == StressOp::kWrite)
        return sequence;
    }
  }

  StressCheck check_;
  std::vector<std::byte> disk_;
};

TEST_F(StressCheckTest, AcceptsWhatTheRequestsWrote) {
  EXPECT_TRUE(run().empty()) << run().front();
}

TEST_F(StressCheckTest, NoticesALostWrite) {
  const auto request = probe::stress_request(check_.parameters, last_write());
  const uint64_t at = request.block * 4096;
  probe::fill_stamp(reinterpret_cast<uint64_t*>(&disk_[at]), {at, 1, 1, 11});
  EXPECT_FALSE(run().empty());
  std::memset(&disk_[at], 0, 4096);
  EXPECT_FALSE(run().empty());
}

// The last write was not flushed: the state without it is as good as the state with it.
TEST_F(StressCheckTest, AcceptsEitherSideOfAnUnflushedWrite) {
  const uint64_t last = last_write();
  check_.durable = last - 1;
  EXPECT_TRUE(run().empty());
  std::memset(disk_.data(), 0, disk_.size());
  for (uint64_t sequence = 1; sequence < last; ++sequence) apply(sequence);
  EXPECT_TRUE(run().empty());
  check_.durable = last;
  EXPECT_FALSE(run().empty());
}

TEST_F(StressCheckTest, NoticesATornBlockUnlessItMayTear) {
  const uint64_t last = last_write();
  check_.durable = last - 1;
  std::memset(disk_.data(), 0, disk_.size());
  for (uint64_t sequence = 1; sequence < last; ++sequence) apply(sequence);
  const uint64_t at = probe::stress_request(check_.parameters, last).block * 4096;
  probe::fill_stamp(reinterpret_cast<uint64_t*>(&disk_[at]), {at, last, 1, 11});
  EXPECT_FALSE(run().empty());
  check_.may_tear = true;
  EXPECT_TRUE(run().empty());
}

TEST_F(StressCheckTest, NoticesDamageAndForeignData) {
  const uint64_t at = probe::stress_request(check_.parameters, last_write()).block * 4096;
  disk_[at + 100] ^= std::byte{1};
  EXPECT_FALSE(run().empty());
  std::memset(&disk_[at], 0x5a, 512);
  EXPECT_FALSE(run().empty());
}

TEST_F(StressCheckTest, NoticesAnotherWritersBlock) {
  const uint64_t last = last_write();
  const uint64_t at = probe::stress_request(check_.parameters, last).block * 4096;
  probe::fill_stamp(reinterpret_cast<uint64_t*>(&disk_[at]), {at, last, 2, 11});
  EXPECT_FALSE(run().empty());
}

}  // namespace
}  // namespace minivmm::test
