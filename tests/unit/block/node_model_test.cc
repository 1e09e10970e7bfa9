// SPDX-License-Identifier: Apache-2.0
// Every kind of node against a plain byte array: random requests of any size and alignment, from
// two loops at once, on both I/O backends.
#include <algorithm>
#include <random>
#include <tuple>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "base/sync.h"
#include "tests/unit/block/graph_fixture.h"
#include "tests/unit/block/temp_directory.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;

constexpr uint64_t kSize = 303'104;  // whole blocks: what pads does not reach past the end
constexpr uint64_t kOffset = 1000;   // where a range begins, and no block
constexpr uint64_t kBehind = 9000;   // and how much lies behind it

struct Kind {
  const char* name;
  const char* keys;  // {0}: the directory
};

constexpr Kind kKinds[] = {
    {"memory", "driver=memory,size=303104"},
    {"file", "driver=file,filename={0}/disk"},
    {"direct", "driver=file,filename={0}/disk,cache.direct=on"},
    {"raw", "driver=raw,file.driver=file,file.filename={0}/disk"},
    {"probed", "driver=raw,probed=on,file.driver=file,file.filename={0}/disk"},
    {"range", "driver=raw,offset=1000,size=303104,file.driver=file,file.filename={0}/wide"},
    {"directrange",
     "driver=raw,offset=1000,size=303104,file.driver=file,file.filename={0}/wide,"
     "file.cache.direct=on"},
    {"filter", "driver=fault,errno=none,file.driver=file,file.filename={0}/disk"},
    {"logged",
     "driver=log-writes,log.driver=file,log.filename={0}/log,file.driver=file,"
     "file.filename={0}/disk"},
};

using Param = std::tuple<Kind, base::BackendChoice>;

class NodeModelTest : public testing::TestWithParam<Param> {
 protected:
  NodeModelTest() : loops_(2, std::get<1>(GetParam())) {
    files_.write("disk", std::string(kSize, '\0'));
    files_.write("wide", std::string(kOffset + kSize + kBehind, 'n'));
    files_.write("log", "");
  }
  ~NodeModelTest() override {
    loops_.loop(0).call("close graph", [&] { graph_.close(); });
  }

  TempDirectory files_;
  base::LoopGroup loops_;
  Graph graph_;
};

// Requests of one fiber, in a part of the disk that is its own.
class Worker {
 public:
  Worker(Handle& handle, uint64_t begin, uint64_t end, uint64_t seed)
      : handle_(handle), begin_(begin), model_(end - begin), random_(seed) {
    handle_.read(begin_, SingleBuffer(std::span(model_)));
  }
  void run(int requests) {
    for (int i = 0; i < requests && !testing::Test::HasFailure(); ++i) step();
    handle_.flush();
    check(0, model_.size());
  }

 private:
  using Range = std::pair<uint64_t, uint64_t>;
  Range choose() {
    const uint64_t at = random_() % model_.size();
    const uint64_t most = random_() % 3 == 0 ? 70'000 : 700;
    return {at, random_() % std::min<uint64_t>(model_.size() - at, most) + 1};
  }
  void check(uint64_t at, uint64_t length) {
    std::vector<std::byte> got(length);
    handle_.read(begin_ + at, SingleBuffer(std::span(got)));
    ASSERT_TRUE(std::equal(got.begin(), got.end(), model_.begin() + static_cast<ptrdiff_t>(at)))
        << length << " bytes at " << begin_ + at;
  }
  void step() {
    const auto [at, length] = choose();
    const bool durable = random_() % 16 == 0;
    const auto from = model_.begin() + static_cast<ptrdiff_t>(at);
    switch (random_() % 8) {
      case 0:
      case 1:
      case 2: {
        std::vector<std::byte> bytes(length);
        for (auto& byte : bytes) byte = static_cast<std::byte>(random_());
        handle_.write(begin_ + at, SingleBuffer(std::span(bytes)), {.fua = durable});
        std::copy(bytes.begin(), bytes.end(), from);
        break;
      }
      case 3:
        handle_.write_zeroes(begin_ + at, length,
                             {.fua = durable, .may_unmap = random_() % 2 == 0});
        std::fill_n(from, length, std::byte{0});
        break;
      case 4:
        discard(at, length);
        break;
      case 5:
        status(at, length);
        break;
      default:
        check(at, length);
    }
  }
  // Each byte is what it was, or zero.
  void discard(uint64_t at, uint64_t length) {
    handle_.discard(begin_ + at, length);
    std::vector<std::byte> got(length);
    handle_.read(begin_ + at, SingleBuffer(std::span(got)));
    for (uint64_t i = 0; i < length; ++i) {
      ASSERT_TRUE(got[i] == model_[at + i] || got[i] == std::byte{0}) << "byte " << begin_ + at + i;
      model_[at + i] = got[i];
    }
  }
  void status(uint64_t at, uint64_t length) {
    const BlockStatus status = handle_.block_status(begin_ + at, length);
    ASSERT_GE(status.length, 1U);
    ASSERT_LE(status.length, length);
    for (uint64_t i = 0; status.zero && i < status.length; ++i) {
      ASSERT_EQ(model_[at + i], std::byte{0})
          << "byte " << begin_ + at + i << " is said to be zero";
    }
  }

  Handle& handle_;
  const uint64_t begin_;
  std::vector<std::byte> model_;
  std::mt19937_64 random_;
};

TEST_P(NodeModelTest, RandomRequestsFromTwoLoopsMatchAByteArray) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const Kind& kind = std::get<0>(GetParam());
  loops_.loop(0).call("test", [&] {
    const std::string keys = fmt::format(fmt::runtime(kind.keys), files_ / ".");
    try {
      graph_.add(Options::from_keys(keys + ",node-name=disk"));
    } catch (const base::Error& e) {
      if (e.err() != EINVAL) throw;
      GTEST_SKIP() << e.what();  // a file system without O_DIRECT
    }
    Handle handle = graph_.attach("disk", "tester", Permissions::front_end(true));
    ASSERT_EQ(handle.size(), kSize);
    // The parts meet inside a block: the two must not undo each other's padding.
    constexpr uint64_t kParts = 4;
    base::WaitGroup group;
    group.add(kParts);
    for (uint64_t part = 0; part < kParts; ++part) {
      loops_.loop(part % 2).post("worker", [&, part] {
        Worker(handle, part * kSize / kParts, (part + 1) * kSize / kParts, seed + part).run(300);
        group.done();
      });
    }
    group.wait();
    EXPECT_EQ(handle.size(), kSize);
    handle.close();
  });
  // What lies beside a range is not touched.
  const std::string wide = files_.read("wide");
  EXPECT_EQ(wide.substr(0, kOffset), std::string(kOffset, 'n'));
  EXPECT_EQ(wide.substr(kOffset + kSize), std::string(kBehind, 'n'));
}

INSTANTIATE_TEST_SUITE_P(Kinds, NodeModelTest,
                         testing::Combine(testing::ValuesIn(kKinds),
                                          testing::Values(base::BackendChoice::kAuto,
                                                          base::BackendChoice::kEpoll)),
                         [](const auto& p) {
                           return std::string(std::get<0>(p.param).name) +
                                  (std::get<1>(p.param) == base::BackendChoice::kEpoll ? "Epoll"
                                                                                       : "");
                         });

}  // namespace
}  // namespace minivmm::block
