// SPDX-License-Identifier: Apache-2.0
// Replies of all kinds that their clients do not read: what they hold while others want the memory,
// and that they come all the same.
#include <poll.h>
#include <string>
#include <unistd.h>

#include <atomic>
#include <semaphore>
#include <thread>
#include <vector>

#include "base/sync.h"
#include "fixture.h"
#include "tests/support/process.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kRead = 0, kStatus = 7;
constexpr uint32_t kInval = 22;
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kDisk = 64 * kMiB;
constexpr uint64_t kPart = 4096;
constexpr uint64_t kHeld = 32 * kMiB;  // requests from there on are not done before it is allowed

// Every other part of it is a hole; or, when that is wished, nothing is.
class Striped final : public block::Node {
 public:
  Striped() : Node("striped", "striped", false) { set_size(kDisk); }

  std::atomic<bool> whole{false};
  base::Event allowed;

 private:
  void driver_read(uint64_t offset, base::IoSpan to) override {
    if (offset >= kHeld) allowed.wait();
    base::fill_zero(to, 0, to.bytes());
  }
  void driver_write(uint64_t, base::IoSpan, block::WriteFlags) override {}
  void driver_flush() override {}
  block::BlockStatus driver_block_status(uint64_t offset, uint64_t length) override {
    block::BlockStatus out;
    out.length = whole ? length : std::min(length, kPart - offset % kPart);
    out.zero = !whole && offset / kPart % 2 == 1;
    out.data = !out.zero;
    out.allocated = true;
    return out;
  }
};

// Nobody is cut off here.
class Unread : public ServerTest {
 protected:
  explicit Unread(std::chrono::milliseconds stall_limit = std::chrono::hours(1))
      : ServerTest({.stall_limit = stall_limit}) {
    add("big", "driver=null,size=1G");
    on_fiber([&] {
      graph_.adopt(disk_);
      server_->add_export(
          "striped", graph_.attach("striped", "the test", block::Permissions::front_end(false)));
    });
  }
  uint64_t used() {
    for (const std::string& line : server_->describe()) {
      const auto at = line.find("memory: ");
      if (at != line.npos) return std::stoull(line.substr(at + 8));
    }
    return 0;
  }
  bool used_becomes(uint64_t most) {
    for (int i = 0; i < 1000 && used() > most; ++i) ::usleep(10'000);
    return used() <= most;
  }
  // Needs nearly all memory that there is.
  void want_memory() {
    Client other = connect();
    other.enter("big");
    EXPECT_EQ(other.read(0, 32 * kMiB).size(), 32 * kMiB);
  }

  const std::shared_ptr<Striped> disk_ = std::make_shared<Striped>();
};

// What a table of extents says, adjacent ones joined: of a striped disk, or of a whole one.
enum class Told { kStripes, kWhole, kNonsense };

Told told_by(const Reply& reply) {
  if (reply.payload.size() == 4 + 8) {
    return reply.number(8, 4) == 0 ? Told::kWhole : Told::kNonsense;
  }
  for (size_t at = 4; at < reply.payload.size(); at += 8) {
    const uint64_t flags = (at - 4) / 8 % 2 == 0 ? 0 : 2;
    if (reply.number(at, 4) != kPart || (reply.number(at + 4, 4) & 2) != flags) {
      return Told::kNonsense;
    }
  }
  return reply.payload.size() > 4 + 8 ? Told::kStripes : Told::kNonsense;
}

// A table is as large as a read, a text not much smaller, and there may be any number of them.
TEST_F(Unread, TablesTextsAndListsOfPartsGiveUpTheirMemoryAndComeAllTheSame) {
  constexpr uint64_t kMany = 600;  // more than a socket takes
  const auto is_read = [](uint64_t cookie) { return cookie % 6 == 0; };
  const auto is_wrong = [](uint64_t cookie) { return cookie % 6 == 1; };
  constexpr uint32_t kLength = 64 << 10;
  want_memory();
  const uint64_t before = resident_mib();
  std::vector<Client> hogs;
  for (int round = 0; round < (kMemoryIsOurs ? 4 : 1); ++round) {
    for (int i = 0; i < 8; ++i) {
      Client& hog = hogs.emplace_back(connect());
      hog.enter("striped", true, true);
      Bytes said;
      for (uint64_t n = 0; n < kMany; ++n) {
        said = join({said, is_read(n)    ? hog.request(kRead, n, 0, kLength)
                           : is_wrong(n) ? hog.request(99, n, 0, 512)
                                         : hog.request(kStatus, n, 0, kHeld)});
      }
      hog.send(said);
    }
    want_memory();
  }
  if (kMemoryIsOurs) {
    EXPECT_LE(resident_mib(), before + 24);
  }
  // What has not begun to go out is asked for again, and another answer by now.
  disk_->whole = true;
  bool stripes = false, whole = false;
  for (Client& hog : hogs) {
    uint64_t answers = 0;
    for (uint64_t data = 0; answers < kMany;) {
      const Reply reply = hog.chunk();
      ASSERT_TRUE(reply.structured);
      ASSERT_LT(reply.cookie, kMany);
      if (is_read(reply.cookie)) {
        ASSERT_EQ(reply.error, 0u);
        data += reply.type == 1 ? reply.payload.size() - 8 : reply.number(8, 4);
      } else if (is_wrong(reply.cookie)) {
        ASSERT_EQ(reply.error, kInval);
      } else {
        const Told told = told_by(reply);
        ASSERT_NE(told, Told::kNonsense);
        (told == Told::kWhole ? whole : stripes) = true;
      }
      if ((reply.flags & 1) == 0) continue;
      ++answers;
      if (is_read(reply.cookie)) {
        ASSERT_EQ(std::exchange(data, 0), kLength);
      }
    }
  }
  EXPECT_TRUE(stripes);
  EXPECT_TRUE(whole);
  EXPECT_TRUE(used_becomes(0)) << used();
}

// They were in flight when others of their client gave up what they held: memory that is taken
// behind a reply without any could never be had back.
TEST_F(Unread, WhatEndsBehindThemHoldsNothingEither) {
  constexpr size_t kHogs = 4;
  constexpr uint64_t kMany = 12;  // more than a socket takes
  constexpr uint32_t kSlow = 8 << 20, kQuick = 512 << 10;
  std::vector<Client> hogs;
  for (size_t i = 0; i < kHogs; ++i) {
    Client& hog = hogs.emplace_back(connect());
    hog.enter("striped");
    Bytes said = hog.request(kRead, 0, kHeld, kSlow);
    for (uint64_t n = 1; n <= kMany; ++n) said = join({said, hog.request(kRead, n, 0, kQuick)});
    hog.send(said);
  }
  constexpr uint64_t kInFlight = kHogs * (kSlow + (16 << 10));
  for (int i = 0; i < 1000 && used() < kInFlight + kHogs * kQuick; ++i) ::usleep(10'000);
  ASSERT_GE(used(), kInFlight + kHogs * kQuick);
  std::thread other([this] { want_memory(); });
  EXPECT_TRUE(used_becomes(kInFlight)) << used();
  disk_->allowed.set();
  other.join();
  for (Client& hog : hogs) {
    uint64_t seen = 0;
    for (uint64_t n = 0; n <= kMany; ++n) {
      const uint64_t cookie = hog.simple(0).cookie;
      const uint32_t length = cookie == 0 ? kSlow : kQuick;
      ASSERT_EQ(hog.receive(length).size(), length);
      seen |= uint64_t{1} << cookie;
    }
    EXPECT_EQ(seen, (uint64_t{2} << kMany) - 1);
  }
  EXPECT_TRUE(used_becomes(0)) << used();
}

// Each of them costs something that stays when it gives up its memory.
TEST_F(Unread, AClientHasOnlySoManyRequestsInHand) {
  constexpr uint64_t kMany = 4000;
  Client hog = connect();
  hog.enter("big");
  Bytes said;
  for (uint64_t n = 0; n < kMany; ++n) {
    const Bytes one = hog.request(kRead, n, 0, 4096);
    said.insert(said.end(), one.begin(), one.end());
  }
  std::thread says([&] { hog.send(said); });
  ::usleep(300'000);
  EXPECT_GT(used(), 0u);
  EXPECT_LE(used(), 3 * kMiB);
  for (uint64_t n = 0; n < kMany; ++n) {
    EXPECT_EQ(hog.simple(0).cookie, n);
    EXPECT_EQ(hog.receive(4096).size(), 4096u);
  }
  says.join();
}

class UnreadForLong : public Unread {
 protected:
  UnreadForLong() : Unread(std::chrono::milliseconds(100)) {}
};

// What so many cost without their memory is too much: who has them in hand, because they were in
// flight before his socket was full, keeps it, and is cut off when he takes nothing.
TEST_F(UnreadForLong, WhoHasFarMoreInHandIsCutOffInstead) {
  constexpr uint64_t kMany = 220;
  constexpr uint32_t kQuick = 512 << 10;
  std::vector<Client> hogs;
  for (int i = 0; i < 6; ++i) {
    Client& hog = hogs.emplace_back(connect());
    hog.enter("striped");
    Bytes said;
    for (uint64_t n = 0; n < kMany; ++n) said = join({said, hog.request(kRead, n, kHeld, 4096)});
    for (uint64_t n = 0; n < 12; ++n) said = join({said, hog.request(kRead, n, 0, kQuick)});
    hog.send(said);
  }
  const uint64_t least = hogs.size() * (kMany * (20 << 10) + kQuick);
  for (int i = 0; i < 1000 && used() < least; ++i) ::usleep(10'000);
  ASSERT_GE(used(), least);
  std::thread other([this] { want_memory(); });
  for (Client& hog : hogs) {
    pollfd p{hog.fd(), POLLRDHUP, 0};
    EXPECT_EQ(::poll(&p, 1, 10'000), 1);
  }
  disk_->allowed.set();
  other.join();
}

TEST_F(Unread, TheLastClientsMemoryGoesWithIt) {
  if (!kMemoryIsOurs) GTEST_SKIP() << "a sanitizer keeps memory of its own";
  constexpr uint32_t kLength = 512 << 10;
  constexpr uint64_t kMany = 48;
  Client client = connect();
  client.enter("big");
  EXPECT_EQ(client.read(0, kLength).size(), kLength);
  const uint64_t before = resident_mib();
  Bytes said;
  for (uint64_t n = 0; n < kMany; ++n) said = join({said, client.request(kRead, n, 0, kLength)});
  client.send(said);
  for (int i = 0; i < 1000 && used() < 8 * kMiB; ++i) ::usleep(10'000);
  for (uint64_t n = 0; n < kMany; ++n) {
    EXPECT_EQ(client.simple(0).cookie, n);
    EXPECT_EQ(client.receive(kLength).size(), kLength);
  }
  EXPECT_GE(resident_mib(), before + 6) << "nothing was kept: this shows nothing";
  client.close();
  for (int i = 0; i < 1000 && resident_mib() > before + 2; ++i) ::usleep(10'000);
  EXPECT_LE(resident_mib(), before + 2);
}

}  // namespace
}  // namespace minivmm::nbd
