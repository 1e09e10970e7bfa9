// SPDX-License-Identifier: Apache-2.0
// Zeroes that are found and discards that are dropped, by what arrives at the node below.
#include "block/filters/write_policy.h"

#include <string>

#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

// Writes down what it is asked for.
class Witness final : public Node {
 public:
  explicit Witness(std::vector<std::string>& seen)
      : Node("witness", "witness", false), seen_(seen) {
    set_size(1 << 20);
    Limits limits;
    limits.can_discard = limits.can_write_zeroes = true;
    set_limits(limits);
  }

 private:
  void driver_read(uint64_t, IoSpan) override {}
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override {
    seen_.push_back(fmt::format("write {}+{}{}", offset, from.bytes(), flags.fua ? " fua" : ""));
  }
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override {
    seen_.push_back(fmt::format("zero {}+{}{}{}{}", offset, length, flags.fua ? " fua" : "",
                                flags.may_unmap ? " unmap" : "", flags.no_fallback ? " fast" : ""));
  }
  void driver_discard(uint64_t offset, uint64_t length) override {
    seen_.push_back(fmt::format("discard {}+{}", offset, length));
  }
  void driver_flush() override { seen_.push_back("flush"); }

  std::vector<std::string>& seen_;
};

using Seen = std::vector<std::string>;

class WritePolicy : public GraphTest {
 protected:
  // What arrives of a write of data, one of zeroes in two pieces, of zeroes that may be a hole, and
  // of a discard.
  Seen arrives(const WritePolicyNode::Policy& policy) {
    Seen seen;
    on_fiber([&] {
      Edge edge(std::make_shared<WritePolicyNode>(NodeConfig{"policy", false},
                                                  std::make_shared<Witness>(seen), policy),
                "the test", Permissions::front_end(true));
      std::string zeroes(8192, '\0');
      std::string data = zeroes;
      data.back() = 'x';
      edge.write(0, base::SingleBuffer(data.data(), data.size()));
      const iovec parts[] = {{zeroes.data(), 4096}, {zeroes.data() + 4096, 4096}};
      edge.write(8192, base::IoSpan(parts), {.fua = true});
      const iovec mixed[] = {{zeroes.data(), 4096}, {data.data() + 4096, 4096}};
      edge.write(16384, base::IoSpan(mixed), {.fua = true});
      edge.write_zeroes(4096, 4096, {.fua = true, .may_unmap = true, .no_fallback = true});
      edge.discard(0, 4096);
    });
    return seen;
  }
};

TEST_F(WritePolicy, NothingIsChangedIfNothingIsSaid) {
  EXPECT_EQ(arrives({}), (Seen{"write 0+8192", "write 8192+8192 fua", "write 16384+8192 fua",
                               "zero 4096+4096 fua unmap fast", "discard 0+4096"}));
}

TEST_F(WritePolicy, WritesOfNothingButZeroesAreFound) {
  EXPECT_EQ(arrives({.detect_zeroes = true}),
            (Seen{"write 0+8192", "zero 8192+8192 fua", "write 16384+8192 fua",
                  "zero 4096+4096 fua unmap fast", "discard 0+4096"}));
  EXPECT_EQ(arrives({.detect_zeroes = true, .unmap_detected = true}),
            (Seen{"write 0+8192", "zero 8192+8192 fua unmap", "write 16384+8192 fua",
                  "zero 4096+4096 fua unmap fast", "discard 0+4096"}));
}

TEST_F(WritePolicy, NothingIsDiscarded) {
  EXPECT_EQ(arrives({.discard = false}),
            (Seen{"write 0+8192", "write 8192+8192 fua", "write 16384+8192 fua",
                  "zero 4096+4096 fua unmap fast"}));
}

TEST_F(WritePolicy, OptionsThatExcludeEachOtherAreRefused) {
  on_fiber([&] {
    const auto open = [&](const std::string& more) {
      return error_number([&] {
        (void)graph_.add(Options::from_keys(
            "driver=write-policy,node-name=p,file.driver=memory,file.size=1M" + more));
        graph_.remove("p");
      });
    };
    EXPECT_EQ(open(""), 0);
    EXPECT_EQ(open(",detect-zeroes=unmap"), 0);
    EXPECT_EQ(open(",detect-zeroes=on,discard=ignore"), 0);
    EXPECT_EQ(open(",detect-zeroes=unmap,discard=ignore"), EINVAL);
    EXPECT_EQ(open(",detect-zeroes=perhaps"), EINVAL);
  });
}

}  // namespace
}  // namespace minivmm::block
