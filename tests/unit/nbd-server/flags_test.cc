// SPDX-License-Identifier: Apache-2.0
// What clients say of durability and holes reaches the node, through the server and through a
// client node before it. One flag that is lost on the way loses data in a power cut, and nothing
// else shows it.
#include <unistd.h>

#include <algorithm>

#include "block/graph/root.h"
#include "fixture.h"
#include "witness.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kWrite = 1, kFlush = 3, kTrim = 4, kZeroes = 6;
constexpr uint16_t kFua = 1, kNoHole = 2, kFastZero = 16;
using Seen = std::vector<std::string>;

class Flags : public ServerTest {
 protected:
  Flags() : path_(testing::TempDir() + "nbd_flags_" + std::to_string(::getpid())) {
    on_fiber([&] {
      graph_.adopt(node_);
      server_->add_export(
          "disk", graph_.attach("witness", "NBD export", block::Permissions::front_end(true)),
          {.description = "", .writable = true});
    });
  }

  const std::string path_;
  const std::shared_ptr<Witness> node_ = std::make_shared<Witness>("witness");
};

TEST_F(Flags, OfEachCommandReachTheNode) {
  for (const bool structured : {false, true}) {
    Client c = connect();
    c.enter("disk", structured);
    const auto becomes = [&](uint16_t type, uint16_t flags, const Seen& expected) {
      const bool flush = type == kFlush;
      EXPECT_EQ(c.error_of(type, flush ? 0 : 4096, flush ? 0 : 512, flags,
                           Bytes(type == kWrite ? 512 : 0, std::byte{1})),
                0u);
      EXPECT_EQ(node_->seen(), expected) << "type " << type << ", flags " << flags;
    };
    becomes(kWrite, 0, {"write 4096+512"});
    becomes(kWrite, kFua, {"write 4096+512 fua"});
    becomes(kZeroes, 0, {"zero 4096+512 unmap"});
    becomes(kZeroes, kNoHole, {"zero 4096+512"});
    becomes(kZeroes, kFua, {"zero 4096+512 fua unmap"});
    becomes(kZeroes, kFua | kNoHole, {"zero 4096+512 fua"});
    becomes(kZeroes, kFastZero, {"zero 4096+512 unmap fast"});
    becomes(kTrim, 0, {"discard 4096+512"});
    becomes(kTrim, kFua, {"discard 4096+512", "flush"});
    becomes(kFlush, 0, {"flush"});
  }
}

// Requests that continue each other are done as one: only those with the same flags.
TEST_F(Flags, OfAdjacentRequestsAreNotMixed) {
  Client c = connect();
  c.enter("disk");
  const auto send = [&](std::initializer_list<uint16_t> flags) {
    Bytes all;
    uint64_t at = 0;
    for (const uint16_t each : flags) {
      all = join({all, c.request(kWrite, at, at, 512, each), Bytes(512, std::byte{1})});
      at += 512;
    }
    c.send(all);
    for (size_t i = 0; i < flags.size(); ++i) EXPECT_EQ(c.simple().error, 0u);
    Seen seen = node_->seen();
    std::sort(seen.begin(), seen.end());
    return seen;
  };
  EXPECT_EQ(send({0, 0, 0, 0}), (Seen{"write 0+2048"}));
  EXPECT_EQ(send({kFua, kFua, kFua}), (Seen{"write 0+1536 fua"}));
  EXPECT_EQ(send({0, 0, kFua, kFua}), (Seen{"write 0+1024", "write 1024+1024 fua"}));
  EXPECT_EQ(send({kFua, 0, kFua}),
            (Seen{"write 0+512 fua", "write 1024+512 fua", "write 512+512"}));
}

// The same through the node `nbd`.
TEST_F(Flags, PassThroughAClientNode) {
  on_fiber([&] {
    ListenOptions options;
    options.uri = "nbd+unix:///?socket=" + path_;
    (void)server_->listen(std::move(options));
  });
  block::Handle remote = on_fiber([&] {
    (void)graph_.add(block::Options::from_keys(
        "driver=nbd,node-name=remote,uri=nbd+unix:///disk?socket=" + path_));
    return graph_.attach("remote", "the test", block::Permissions::front_end(true));
  });
  Bytes data(512, std::byte{1});
  const auto becomes = [&](auto request, const Seen& expected) {
    on_fiber(request);
    EXPECT_EQ(node_->seen(), expected);
  };
  const base::SingleBuffer buffer(data.data(), data.size());
  becomes([&] { remote.write(512, buffer); }, {"write 512+512"});
  becomes([&] { remote.write(512, buffer, {.fua = true}); }, {"write 512+512 fua"});
  becomes([&] { remote.write_zeroes(512, 512, {}); }, {"zero 512+512"});
  becomes([&] { remote.write_zeroes(512, 512, {.may_unmap = true}); }, {"zero 512+512 unmap"});
  becomes([&] { remote.write_zeroes(512, 512, {.fua = true}); }, {"zero 512+512 fua"});
  becomes([&] { remote.write_zeroes(512, 512, {.no_fallback = true}); }, {"zero 512+512 fast"});
  becomes([&] { remote.discard(512, 512); }, {"discard 512+512"});
  becomes([&] { remote.flush(); }, {"flush"});
  // Who closes it has not said flush.
  on_fiber([&] { remote.write(512, buffer); });
  (void)node_->seen();
  on_fiber([&] {
    remote.close();
    graph_.remove("remote");
  });
  const Seen end = node_->seen();
  EXPECT_NE(std::find(end.begin(), end.end(), "flush"), end.end());
}

}  // namespace
}  // namespace minivmm::nbd
