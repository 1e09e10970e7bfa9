// SPDX-License-Identifier: Apache-2.0
// What bounds the memory of a server with many clients: what is set aside for connections, what
// pools of buffers keep, and where input waits.
#include <string>

#include <cstring>
#include <vector>

#include <gtest/gtest.h>

#include "base/io.h"
#include "base/loop_group.h"
#include "base/sync.h"
#include "nbd-server/budget.h"
#include "nbd-server/input.h"
#include "nbd-server/resources.h"

namespace minivmm::nbd {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

TEST(SetAside, IsNotOpenToRequests) {
  Budget budget(100);
  budget.set_aside(40);
  EXPECT_TRUE(budget.try_acquire(30));
  EXPECT_FALSE(budget.try_acquire(31));
  EXPECT_TRUE(budget.try_acquire(30));
  EXPECT_EQ(budget.spare(), 0u);
  budget.put_back(40);
  EXPECT_EQ(budget.spare(), 15u);
  EXPECT_TRUE(budget.try_acquire(40));
  EXPECT_FALSE(budget.try_acquire(1));
}

// However many connections there are. Or a request that is larger than what they leave would never
// be admitted.
TEST(SetAside, LeavesRoomForALargeRequestWhenLittleIsInUse) {
  Budget budget(100);
  budget.set_aside(1000);
  EXPECT_TRUE(budget.try_acquire(25));
  EXPECT_TRUE(budget.try_acquire(75));
  EXPECT_FALSE(budget.try_acquire(1));
  budget.release(74);
  EXPECT_FALSE(budget.try_acquire(1));  // more than a quarter is in use
  budget.release(1);
  EXPECT_TRUE(budget.try_acquire(75));
}

TEST(SetAside, WhoWaitedGetsItWhenItIsPutBack) {
  base::LoopGroup loops(1);
  Budget budget(100);
  base::CancelSource never;
  bool done = false;
  loops.loop(0).call("test", [&] {
    budget.set_aside(50);
    ASSERT_TRUE(budget.try_acquire(40));
    base::WaitGroup group;
    group.add(1);
    loops.loop(0).spawn("waits", [&] {
      EXPECT_TRUE(budget.acquire(40, never));
      done = true;
      group.done();
    });
    base::io::sleep_for(std::chrono::milliseconds(1));
    EXPECT_FALSE(done);
    budget.put_back(50);
    group.wait();
  });
  EXPECT_EQ(budget.used(), 80u);
}

TEST(SetAside, AConnectionsCostEndsWithIt) {
  Budgets budgets(48 * kMiB);
  {
    ConnectionCost plain(budgets), encrypted(budgets);
    encrypted.set(ConnectionCost::kTls);
    EXPECT_EQ(budgets.set_aside(), ConnectionCost::kPlain + ConnectionCost::kTls);
  }
  EXPECT_EQ(budgets.set_aside(), 0u);
}

class Kept final : public KeptBuffers {
 public:
  bool too_much() const noexcept override { return tight; }
  void trim_all() noexcept override { ++trims; }
  bool tight = false;
  int trims = 0;
};

TEST(NbdBufferPool, GivesBackWhatItKeepsWhenMemoryIsTight) {
  Kept kept;
  BufferPool pool(kept);
  for (int i = 0; i < 2; ++i) {
    base::Pages buffers[6];
    for (base::Pages& each : buffers) each = pool.take(kMiB);
    for (base::Pages& each : buffers) pool.give_back(std::move(each));
    EXPECT_EQ(pool.kept(), 6 * kMiB);
    EXPECT_EQ(kept.bytes(), 6 * kMiB);
    EXPECT_EQ(kept.trims, 0);
  }
  kept.tight = true;
  base::Pages same = pool.take(kMiB);  // of those that it has
  EXPECT_EQ(pool.kept(), 5 * kMiB);
  EXPECT_EQ(kept.trims, 0);
  base::Pages other = pool.take(2 * kMiB);
  EXPECT_EQ(pool.kept(), 0u);
  EXPECT_EQ(kept.bytes(), 0u);
  EXPECT_EQ(kept.trims, 1);
  pool.give_back(std::move(other));
  (void)pool.take(8 * kMiB);  // little is kept: it stays
  EXPECT_EQ(pool.kept(), 2 * kMiB);
}

TEST(NbdBufferPool, KeepsNoMoreThanAllPoolsMay) {
  Kept kept;
  kept.add(KeptBuffers::kMost - kMiB / 2);
  BufferPool pool(kept);
  pool.give_back(pool.take(kMiB));
  EXPECT_EQ(pool.kept(), 0u);
  kept.remove(kMiB / 2);
  pool.give_back(pool.take(kMiB));
  EXPECT_EQ(pool.kept(), kMiB);
}

TEST(NbdBufferPool, GivesBackWhatWasNotNeededFromOneTimeToTheNext) {
  Kept kept;
  BufferPool pool(kept);
  const auto use = [&](size_t count) {
    std::vector<base::Pages> all;
    for (size_t i = 0; i < count; ++i) all.push_back(pool.take(kMiB));
    for (base::Pages& each : all) pool.give_back(std::move(each));
  };
  use(12);
  pool.shrink();
  EXPECT_EQ(pool.kept(), 12 * kMiB);
  use(5);
  pool.shrink();
  EXPECT_EQ(pool.kept(), 5 * kMiB);
  EXPECT_EQ(kept.bytes(), 5 * kMiB);
  use(2);
  pool.shrink();
  EXPECT_EQ(pool.kept(), 5 * kMiB);  // little: it stays
  pool.shrink();
  EXPECT_EQ(pool.kept(), 0u);
}

// What a request is charged for is what it gets.
TEST(NbdBufferPool, SaysHowMuchItGives) {
  Kept kept;
  BufferPool pool(kept);
  EXPECT_EQ(BufferPool::room_for(0), 0u);
  for (const size_t size :
       {size_t{1}, size_t{4096}, size_t{4097}, size_t{65536}, size_t{1000001}, size_t{32} << 20}) {
    EXPECT_EQ(pool.take(size).size(), BufferPool::room_for(size)) << size;
  }
}

class ParkedInput : public testing::Test {
 protected:
  void receive(const std::string& bytes) {
    const iovec room = input_.room(SIZE_MAX);
    ASSERT_GE(room.iov_len, bytes.size());
    std::memcpy(room.iov_base, bytes.data(), bytes.size());
    input_.received(bytes.size());
  }
  std::string content() const {
    return {reinterpret_cast<const char*>(input_.data()), input_.size()};
  }
  Kept kept_;
  Resources resources_{kept_};
  Budget budget_{48 * kMiB};
  Input input_{resources_, budget_};
};

TEST_F(ParkedInput, StaysAsItIsAndGoesOnInAWholeBlock) {
  for (const size_t length : {0u, 20u, 400u, 9000u, 16000u}) {
    std::string all(length, 'a');
    receive("begin" + all.substr(0, length - length / 3));
    input_.consume(5);
    input_.park();
    EXPECT_EQ(content(), all.substr(0, length - length / 3));
    input_.park();
    receive(std::string(length / 3, 'a') + "end");
    EXPECT_EQ(content(), all + "end");
    input_.consume(input_.size());
    input_.idle();
  }
}

TEST_F(ParkedInput, GivesItsBlockBack) {
  receive(std::string(400, 'a'));
  EXPECT_EQ(resources_.buffers().kept(), 0u);
  input_.park();
  EXPECT_EQ(resources_.buffers().kept(), Input::kSmallBlock);
}

// A write reads from it.
TEST_F(ParkedInput, DoesNotMoveWhatIsInUse) {
  receive(std::string(400, 'a'));
  const std::byte* const before = input_.data();
  InputBlock& block = input_.pin();
  input_.park();
  EXPECT_EQ(input_.data(), before);
  input_.release(block);
}

}  // namespace
}  // namespace minivmm::nbd
