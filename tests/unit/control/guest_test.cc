// SPDX-License-Identifier: Apache-2.0
#include "control/guest.h"

#include <string>
#include <string_view>
#include <unistd.h>

#include <vector>

#include <gtest/gtest.h>

namespace minivmm::control {
namespace {

// Who hears that the guest goes on may hear next that it has stopped again: so it is told first.
TEST(Guest, IsSaidToGoOnBeforeItDoes) {
  if (::access("/dev/kvm", R_OK | W_OK) != 0) GTEST_SKIP() << "no /dev/kvm";
  base::LoopGroup loops(1);
  block::Graph graph;
  Boot boot;
  boot.probe = true;
  boot.memory_bytes = uint64_t{32} << 20;
  boot.rng = false;
  boot.serial = "none";
  const SerialPort serial(loops, boot.serial, false);
  std::vector<std::string> told;
  Guest* guest = nullptr;
  const auto tell = [&](std::string_view what) {
    told.emplace_back(what).append(1, ' ').append(guest->status());
  };
  GuestEvents events;
  events.stopped = [&] { tell("stopped"); };
  events.resumed = [&] { tell("resumed"); };
  Guest made(loops, graph, serial, boot, {}, false, events);
  guest = &made;
  EXPECT_TRUE(made.hold());
  EXPECT_FALSE(made.hold());
  made.resume();
  made.resume();
  EXPECT_EQ(made.status(), "running");
  EXPECT_EQ(told, (std::vector<std::string>{"stopped paused", "resumed paused"}));
  std::vector<std::string> problems;
  EXPECT_TRUE(made.stop(std::chrono::seconds(1), problems));
  EXPECT_EQ(problems, std::vector<std::string>());
}

}  // namespace
}  // namespace minivmm::control
