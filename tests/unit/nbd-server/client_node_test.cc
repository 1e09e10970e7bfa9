// SPDX-License-Identifier: Apache-2.0
// The node `nbd` against our server, in one process: what is lost and repeated when the server ends
// and comes back is seen on the nodes behind it.
#include <unistd.h>

#include <array>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "base/io.h"
#include "block/graph/root.h"
#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint64_t kSize = 1 << 20;

class ClientNode : public ServerTest {
 protected:
  ClientNode() : path_(testing::TempDir() + "nbd_client_" + std::to_string(::getpid())) {
    add("disk", "driver=memory,size=1M");
    listen();
  }
  ~ClientNode() override {
    on_fiber([&] {
      // Some tests end without a server to flush to.
      try {
        if (remote_) remote_.close();
      } catch (const base::Error&) {
      }
      try {
        graph_.remove("remote");
      } catch (const base::Error&) {
      }
    });
  }

  std::string uri(const std::string& name = "disk") const {
    return "nbd+unix:///" + name + "?socket=" + path_;
  }
  void listen() {
    ListenOptions options;
    options.uri = uri("");
    on_fiber([&] { (void)server_->listen(std::move(options)); });
  }
  void stop() {
    on_fiber([&] { (void)server_->stop(soon()); });
    server_.reset();
  }
  // Another server at the same place, for whose exports the caller cares.
  void start_again() { server_.emplace(loops_); }

  void open(const std::string& keys = "", const std::string& name = "disk") {
    on_fiber([&] {
      (void)graph_.add(
          block::Options::from_keys("driver=nbd,node-name=remote,uri=" + uri(name) + keys));
      const bool writable = keys.find("read-only=on") == keys.npos;
      remote_ = graph_.attach("remote", "the test", block::Permissions::front_end(writable));
    });
  }
  void write(uint64_t offset, const Bytes& data) {
    on_fiber([&] { remote_.write(offset, base::SingleBuffer(data.data(), data.size())); });
  }
  Bytes read(uint64_t offset, size_t size) {
    Bytes out(size);
    on_fiber([&] { remote_.read(offset, base::SingleBuffer(out.data(), size)); });
    return out;
  }
  // What lies in the node behind the server.
  Bytes behind(const std::string& node, uint64_t offset, size_t size) {
    return on_fiber([&] {
      Bytes out(size);
      block::Handle handle = graph_.attach(node, "a look", block::Permissions::front_end(false));
      handle.read(offset, base::SingleBuffer(out.data(), size));
      handle.close();
      return out;
    });
  }
  std::string fact(const std::string& name) {
    for (const auto& [key, value] : graph_.find("remote")->facts()) {
      if (key != name) continue;
      if (const auto* const number = std::get_if<uint64_t>(&value)) return std::to_string(*number);
      if (const auto* const text = std::get_if<std::string>(&value)) return *text;
    }
    return "none";
  }

  const std::string path_;
  block::Handle remote_;
};

TEST_F(ClientNode, ARandomConversationMatchesAModel) {
  open();
  std::mt19937 random(testing::UnitTest::GetInstance()->random_seed());
  SCOPED_TRACE("seed " + std::to_string(testing::UnitTest::GetInstance()->random_seed()));
  Bytes model(kSize);
  on_fiber([&] {
    for (int i = 0; i < 600; ++i) {
      const uint64_t offset = random() % kSize;
      const size_t length = 1 + random() % std::min<uint64_t>(kSize - offset, 70'000);
      Bytes data(length);
      for (auto& byte : data) byte = static_cast<std::byte>(random());
      const size_t half = length / 2;
      const std::array<iovec, 2> parts = {iovec{data.data(), half},
                                          iovec{data.data() + half, length - half}};
      const base::IoSpan span(parts);
      const auto at = model.begin() + static_cast<ptrdiff_t>(offset);
      switch (random() % 4) {
        case 0:
          remote_.write(offset, span, {.fua = random() % 2 == 0});
          std::copy(data.begin(), data.end(), at);
          break;
        case 1:
          remote_.write_zeroes(offset, length, {.fua = false, .may_unmap = random() % 2 == 0});
          std::fill(at, at + static_cast<ptrdiff_t>(length), std::byte{0});
          break;
        case 2:
          remote_.flush();
          break;
        default:
          remote_.read(offset, span);
          ASSERT_TRUE(std::equal(data.begin(), data.end(), at)) << offset << " " << length;
      }
    }
  });
  EXPECT_EQ(behind("node1", 0, kSize), model);
}

TEST_F(ClientNode, HolesArePassedThrough) {
  const std::string file = path_ + ".raw";
  std::filesystem::remove(file);
  std::ofstream(file).close();
  std::filesystem::resize_file(file, kSize);
  add("holes", "driver=file,filename=" + file);
  open("", "holes");
  write(65536, Bytes(65536, std::byte{1}));
  const auto status = [&](uint64_t at) {
    return on_fiber([&] { return remote_.block_status(at, kSize - at); });
  };
  EXPECT_TRUE(status(0).zero);
  EXPECT_FALSE(status(0).data);
  EXPECT_EQ(status(0).length, 65536u);
  EXPECT_TRUE(status(65536).data);
  EXPECT_EQ(status(65536).length, 65536u);
  EXPECT_EQ(status(131072).length, kSize - 131072);
  on_fiber([&] { remote_.discard(65536, 65536); });
  EXPECT_TRUE(status(65536).zero);
  std::filesystem::remove(file);
}

TEST_F(ClientNode, TheServersErrorsAreThoseOfTheRequest) {
  add("sick",
      "driver=fault,op=write,offset=4096,length=4096,errno=ENOSPC,file.driver=memory,"
      "file.size=1M");
  open("", "sick");
  EXPECT_EQ(error_number([&] { write(4096, Bytes(512)); }), ENOSPC);
  EXPECT_EQ(error_number([&] { write(0, Bytes(512)); }), 0);
  EXPECT_EQ(fact("reconnects"), "0");
}

TEST_F(ClientNode, WhatCannotBeOpenedSaysWhy) {
  add("ro", "driver=memory,size=1M", false);
  EXPECT_EQ(error_number([&] { open("", "ro"); }), EROFS);
  EXPECT_EQ(error_number([&] { open("", "nosuch"); }), ENOENT);
  EXPECT_EQ(error_number([&] { open(",nonsense=1"); }), EINVAL);
  EXPECT_EQ(error_number([&] { open(",connections=17"); }), EINVAL);
  open(",read-only=on", "ro");
  EXPECT_EQ(read(0, 512), Bytes(512));
}

TEST_F(ClientNode, RequestsFailWhileTheServerIsAwayAndWorkWhenItIsBack) {
  open();
  write(0, Bytes(512, std::byte{1}));
  stop();
  EXPECT_EQ(error_number([&] { write(0, Bytes(512)); }), EIO);
  EXPECT_EQ(error_number([&] { read(0, 512); }), EIO);
  start_again();
  add("disk", "driver=memory,size=1M");
  listen();
  const auto deadline = soon();
  while (error_number([&] { read(0, 512); }) != 0 && base::Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  EXPECT_EQ(read(0, 512), Bytes(512));
  EXPECT_EQ(fact("reconnects"), "1");
}

// Restarts under load: every write that was acknowledged is there, and none of an older round came
// after one of a newer round.
TEST_F(ClientNode, RestartsLoseAndRepeatNoWrite) {
  open(",reconnect-delay=30,connections=4");
  std::atomic<bool> stop_writing{false};
  constexpr size_t kWriters = 8;
  std::array<std::atomic<uint64_t>, kWriters> rounds{};
  std::array<bool, kWriters> failed{};
  std::array<std::atomic<bool>, kWriters> ended{};
  for (size_t w = 0; w < kWriters; ++w) {
    loops_.loop(w % loops_.size()).post("writer", [&, w] {
      try {
        while (!stop_writing) {
          const uint64_t round = rounds[w] + 1;
          Bytes data(4096, static_cast<std::byte>(round));
          remote_.write(w * 4096, base::SingleBuffer(data.data(), data.size()));
          rounds[w] = round;
          Bytes back(4096);
          remote_.read(w * 4096, base::SingleBuffer(back.data(), back.size()));
          if (back != data) failed[w] = true;
          if (round % 16 == 0) remote_.flush();
        }
      } catch (const base::Error&) {
        failed[w] = true;
      }
      ended[w] = true;
    });
  }
  // However slow the machine is, each writer gets on before the server goes again.
  const auto wait_for_rounds = [&](uint64_t more) {
    for (size_t w = 0; w < kWriters; ++w) {
      const uint64_t goal = rounds[w] + more;
      const auto deadline = soon();
      while (rounds[w] < goal && !ended[w] && base::Clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      EXPECT_GE(rounds[w], goal) << w;
    }
  };
  // The node behind stays: what it holds is what was written.
  for (int restart = 0; restart < 5; ++restart) {
    wait_for_rounds(2);
    stop();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    start_again();
    on_fiber([&] {
      server_->add_export("disk",
                          graph_.attach("node1", "NBD export", block::Permissions::front_end(true)),
                          {.description = "", .writable = true});
    });
    listen();
  }
  wait_for_rounds(2);
  stop_writing = true;
  for (auto& each : ended) {
    while (!each) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (size_t w = 0; w < kWriters; ++w) {
    EXPECT_FALSE(failed[w]) << w;
    EXPECT_EQ(behind("node1", w * 4096, 4096),
              Bytes(4096, static_cast<std::byte>(rounds[w].load())))
        << w;
  }
  EXPECT_GE(std::stoul(fact("reconnects")), 5u);
}

// A server that was killed has forgotten what it had not flushed: it is done again, in its order,
// before the flush after that returns.
TEST_F(ClientNode, WhatAKilledServerForgotIsDoneAgain) {
  open(",reconnect-delay=30");
  write(0, Bytes(8192, std::byte{1}));
  on_fiber([&] { remote_.flush(); });
  write(4096, Bytes(8192, std::byte{2}));
  write(8192, Bytes(8192, std::byte{3}));
  on_fiber([&] { remote_.write_zeroes(9216, 512, {}); });
  stop();
  start_again();
  add("disk", "driver=memory,size=1M");  // as the disk was when the server began, without the flush
  listen();
  on_fiber([&] { remote_.flush(); });
  Bytes expected(20480);
  std::fill_n(expected.begin() + 4096, 4096, std::byte{2});
  std::fill_n(expected.begin() + 8192, 8192, std::byte{3});
  std::fill_n(expected.begin() + 9216, 512, std::byte{0});
  EXPECT_EQ(behind("node2", 0, expected.size()), expected);
  // Flushed now: not a third time.
  stop();
  start_again();
  add("disk", "driver=memory,size=1M");
  listen();
  on_fiber([&] { remote_.flush(); });
  EXPECT_EQ(behind("node3", 0, 20480), Bytes(20480));
}

// A write that was durable at once is newer than those before it that were not: when they are done
// again, so is it.
TEST_F(ClientNode, WhatIsDoneAgainDoesNotCoverWhatWasDurable) {
  open(",reconnect-delay=30");
  write(0, Bytes(8192, std::byte{1}));
  on_fiber([&] {
    Bytes data(4096, std::byte{2});
    remote_.write(0, base::SingleBuffer(data.data(), data.size()), {.fua = true});
    remote_.write_zeroes(6144, 1024, {.fua = true});
  });
  stop();
  start_again();
  add("disk", "driver=memory,size=1M");
  listen();
  on_fiber([&] { remote_.flush(); });
  Bytes expected(8192, std::byte{1});
  std::fill_n(expected.begin(), 4096, std::byte{2});
  std::fill_n(expected.begin() + 6144, 1024, std::byte{0});
  EXPECT_EQ(behind("node2", 0, expected.size()), expected);
  // Where there is nothing before it nothing has to be kept.
  on_fiber([&] {
    Bytes data(4096, std::byte{3});
    remote_.write(0, base::SingleBuffer(data.data(), data.size()), {.fua = true});
  });
  stop();
  start_again();
  add("disk", "driver=memory,size=1M");
  listen();
  on_fiber([&] { remote_.flush(); });
  EXPECT_EQ(behind("node3", 0, 4096), Bytes(4096));
}

TEST_F(ClientNode, AnotherDiskUnderTheNameIsNotTaken) {
  open(",reconnect-delay=1");
  write(0, Bytes(512, std::byte{1}));
  stop();
  start_again();
  add("disk", "driver=memory,size=2M");
  listen();
  EXPECT_EQ(error_number([&] { write(0, Bytes(512, std::byte{2})); }), EIO);
  EXPECT_EQ(behind("node2", 0, 512), Bytes(512));
}

TEST_F(ClientNode, EveryLoopGetsAConnectionOfItsOwn) {
  open();
  EXPECT_EQ(fact("connections"), "1");
  const auto deadline = soon();
  while (fact("connections") != "2" && base::Clock::now() < deadline) {
    for (size_t i = 0; i < loops_.size(); ++i) {
      loops_.loop(i).call("read", [&] {
        Bytes out(512);
        remote_.read(0, base::SingleBuffer(out.data(), out.size()));
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(fact("connections"), "2");
}

TEST_F(ClientNode, AServerThatIsAwayAtTheStartIsWaitedFor) {
  stop();
  start_again();
  add("disk", "driver=memory,size=1M");
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    listen();
  });
  EXPECT_EQ(error_number([&] { open(",open-timeout=20"); }), 0);
  later.join();
  EXPECT_EQ(read(0, 512), Bytes(512));
}

}  // namespace
}  // namespace minivmm::nbd
