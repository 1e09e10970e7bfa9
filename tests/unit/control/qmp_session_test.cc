// SPDX-License-Identifier: Apache-2.0
// Clients of the control socket that do not behave, and its end while they are there.
#include <poll.h>
#include <string>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include <gtest/gtest.h>

#include "base/io.h"
#include "base/loop_group.h"
#include "control/qmp/message.h"
#include "control/qmp/server.h"
#include "tests/support/no_target.h"

namespace minivmm::control::qmp {
namespace {

using std::chrono::milliseconds;

// Of which only the state can be asked for, and takes a while.
class SlowTarget final : public NoTarget {
 public:
  std::vector<std::string> state() override {
    running = true;
    (void)base::io::sleep_for(takes);
    return std::vector<std::string>(lines, std::string(1000, 'x'));
  }

  std::atomic<bool> running{false};
  milliseconds takes{0};
  size_t lines = 1;
};

class QmpSession : public ::testing::Test {
 protected:
  void start(const SessionLimits& limits = {}) {
    server_ = std::make_shared<Server>(loops_.loop(0), target_, limits);
  }
  ~QmpSession() override {
    if (server_) (void)stop(milliseconds(5000));
  }

  // Our end of a client's connection.
  base::UniqueFd connect() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    const int small = 4096;
    EXPECT_EQ(::setsockopt(ends[1], SOL_SOCKET, SO_SNDBUF, &small, sizeof small), 0);
    loops_.loop(0).call("serve", [&] { server_->serve(base::UniqueFd(ends[1])); });
    return base::UniqueFd(ends[0]);
  }
  std::vector<std::string> stop(milliseconds patience) {
    return loops_.loop(0).call("stop",
                               [&] { return server_->stop(base::Clock::now() + patience); });
  }
  static void say(const base::UniqueFd& to, const std::string& text) {
    ASSERT_EQ(::send(to.get(), text.data(), text.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(text.size()));
  }
  // Everything until the end of the connection, or until `last` is seen.
  static std::string hear(const base::UniqueFd& from, const std::string& last = {}) {
    std::string out;
    for (;;) {
      if (!last.empty() && out.find(last) != std::string::npos) return out;
      pollfd ready{from.get(), POLLIN, 0};
      if (::poll(&ready, 1, 20'000) != 1) return out + "(nothing more comes)";
      char piece[4096];
      const ssize_t n = ::recv(from.get(), piece, sizeof piece, 0);
      if (n <= 0) return out + "(end)";
      out.append(piece, static_cast<size_t>(n));
    }
  }
  base::UniqueFd negotiated() {
    base::UniqueFd out = connect();
    say(out, R"({"execute":"qmp_capabilities","id":"first"})");
    (void)hear(out, "\"id\": \"first\"");
    return out;
  }

  base::LoopGroup loops_{1};
  SlowTarget target_;
  std::shared_ptr<Server> server_;
};

TEST_F(QmpSession, EventsComeOnceAClientHasNegotiated) {
  start();
  const base::UniqueFd early = connect();
  (void)hear(early, "\"QMP\"");
  const base::UniqueFd ready = negotiated();
  server_->emit("STOP", {});
  EXPECT_NE(hear(ready, "\n").find("\"STOP\""), std::string::npos);
  say(early, R"({"execute":"qmp_capabilities"})");
  EXPECT_EQ(hear(early, "\n").find("STOP"), std::string::npos);
}

TEST_F(QmpSession, WhoDoesNotReadHisEventsIsCutOffAndNobodyElse) {
  start({.waiting_bytes = 8192});
  const base::UniqueFd lazy = negotiated();
  const base::UniqueFd eager = negotiated();
  for (int i = 0; i < 1000; ++i) {
    server_->emit("TICK", {{"number", i}});
    const std::string number = "\"number\": " + std::to_string(i) + "}";
    ASSERT_NE(hear(eager, number).find(number), std::string::npos) << i;
  }
  const std::string heard = hear(lazy);
  EXPECT_TRUE(heard.ends_with("(end)"));
  EXPECT_EQ(heard.find("\"number\": 999}"), std::string::npos);
}

TEST_F(QmpSession, WhoTakesNoAnswerIsCutOff) {
  start({.stall = milliseconds(100)});
  target_.lines = 1000;  // a megabyte
  const base::UniqueFd lazy = negotiated();
  say(lazy, R"({"execute":"query-state"})");
  const auto begin = std::chrono::steady_clock::now();
  while (!target_.running) std::this_thread::sleep_for(milliseconds(1));
  std::this_thread::sleep_for(milliseconds(300));
  EXPECT_TRUE(hear(lazy).ends_with("(end)"));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

TEST_F(QmpSession, WhoReadsSlowlyGetsAll) {
  start({.stall = milliseconds(2000)});
  target_.lines = 300;
  const base::UniqueFd client = negotiated();
  say(client, R"({"execute":"query-state","id":1})");
  std::string heard;
  while (heard.find("\"id\": 1") == std::string::npos) {
    std::this_thread::sleep_for(milliseconds(1));
    char piece[4096];
    const ssize_t n = ::recv(client.get(), piece, sizeof piece, 0);
    ASSERT_GT(n, 0);
    heard.append(piece, static_cast<size_t>(n));
  }
  EXPECT_GT(heard.size(), 300'000U);
}

TEST_F(QmpSession, AnEndWaitsForTheCommandUnderWay) {
  start();
  target_.takes = milliseconds(100);
  const base::UniqueFd client = negotiated();
  const base::UniqueFd idle = negotiated();
  say(client, R"({"execute":"query-state","id":1}{"execute":"query-state","id":2})");
  while (!target_.running) std::this_thread::sleep_for(milliseconds(1));
  EXPECT_TRUE(stop(milliseconds(10'000)).empty());
  const std::string heard = hear(client);
  EXPECT_NE(heard.find("\"id\": 1"), std::string::npos) << heard;
  EXPECT_EQ(heard.find("\"id\": 2"), std::string::npos) << heard;  // it was not begun
  EXPECT_EQ(hear(idle), "(end)");
}

TEST_F(QmpSession, AnEndNamesWhatDoesNotEnd) {
  start();
  target_.takes = milliseconds(500);
  const base::UniqueFd client = negotiated();
  say(client, R"({"execute":"query-state"})");
  while (!target_.running) std::this_thread::sleep_for(milliseconds(1));
  const auto left = stop(milliseconds(20));
  ASSERT_EQ(left.size(), 1U);
  EXPECT_EQ(left[0], "control socket: the command query-state has not ended");
}

TEST_F(QmpSession, NothingIsServedAfterTheEnd) {
  start();
  EXPECT_TRUE(stop(milliseconds(1000)).empty());
  EXPECT_EQ(hear(connect()), "(end)");
}

}  // namespace
}  // namespace minivmm::control::qmp
