// SPDX-License-Identifier: Apache-2.0
// A server over a graph on some loops, two if nothing is said, and clients by socketpair.
#pragma once

#include <string>
#include <sys/socket.h>
#include <sys/un.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/loop_group.h"
#include "block/graph/graph.h"
#include "client.h"
#include "nbd-server/server.h"

namespace minivmm::nbd {

class ServerTest : public testing::Test {
 protected:
  explicit ServerTest(ServerOptions options = {}, unsigned loops = 2)
      : loops_(loops), server_(std::in_place, loops_, options) {}
  ~ServerTest() override {
    loops_.loop(0).call("stop", [&] {
      if (server_) {
        EXPECT_EQ(server_->stop(base::Clock::now() + std::chrono::seconds(10)),
                  std::vector<std::string>());
      }
      server_.reset();
      graph_.close();
    });
  }

  // Runs `body` as a fiber of the first loop. An Error is thrown anew on this side: TSan does not
  // see how the C++ runtime hands an exception object from thread to thread.
  template <typename Body>
  auto on_fiber(Body&& body) -> std::invoke_result_t<Body> {
    using Result = std::invoke_result_t<Body>;
    std::conditional_t<std::is_void_v<Result>, bool, std::optional<Result>> result{};
    int err = 0;
    std::string text;
    loops_.loop(0).call("test", [&] {
      try {
        if constexpr (std::is_void_v<Result>) {
          body();
        } else {
          result.emplace(body());
        }
      } catch (const base::Error& e) {
        err = e.err();
        text = e.what();
      }
    });
    if (err != 0) throw base::Error(err, text);
    if constexpr (!std::is_void_v<Result>) return std::move(*result);
  }

  // Opens a node ("driver=memory,size=1M") and exports it under `name`.
  void add(const std::string& name, const std::string& keys, bool writable = true,
           const std::string& description = {}) {
    on_fiber([&] {
      block::Options options = block::Options::from_keys(keys);
      options.set("node-name", "node" + std::to_string(++nodes_));
      const auto node = graph_.add(std::move(options));
      server_->add_export(name,
                          graph_.attach(node->name(), "NBD export '" + name + "'",
                                        block::Permissions::front_end(writable)),
                          {.description = description, .writable = writable});
    });
  }

  Client connect() {
    int pair[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    server_->serve(base::UniqueFd(pair[0]));
    return Client(base::UniqueFd(pair[1]));
  }

  // By a listener's unix socket.
  static Client connect_to(const std::string& path) {
    base::UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return Client(std::move(fd));
  }

  base::LoopGroup loops_;
  block::Graph graph_;
  std::optional<Server> server_;
  int nodes_ = 0;
};

inline base::Clock::time_point soon() { return base::Clock::now() + std::chrono::seconds(10); }

// The errno of the base::Error that `body` throws; 0 if it throws none.
template <typename Body>
int error_number(Body&& body) {
  try {
    body();
  } catch (const base::Error& e) {
    return e.err();
  }
  return 0;
}

}  // namespace minivmm::nbd
