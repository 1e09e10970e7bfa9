// SPDX-License-Identifier: Apache-2.0
#include "vmm/thread_filter.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <thread>

#include <gtest/gtest.h>
#include <termios.h>

#include "base/call_filter.h"
#include "base/unique_fd.h"

namespace minivmm::vmm {
namespace {

void confined(ThreadKind kind, const std::function<void()>& body) {
  if (!base::CallFilter::in_effect()) GTEST_SKIP() << "sanitizers need more than a filter allows";
  std::thread([&] {
    confine_thread(kind, "test");
    body();
  }).join();
}

void expect_refused(int64_t result) {
  EXPECT_EQ(result, -1);
  EXPECT_EQ(errno, EPERM);
}

// Whatever a guest made such a thread do: no file, no process, no connection.
TEST(ThreadFilter, NothingNewIsOpened) {
  for (const ThreadKind kind : {ThreadKind::kVcpu, ThreadKind::kSerial}) {
    confined(kind, [] {
      expect_refused(::open("/dev/null", O_RDONLY));
      expect_refused(::socket(AF_INET, SOCK_STREAM, 0));
      expect_refused(::fork());
      expect_refused(::execl("/bin/true", "true", nullptr));
      expect_refused(::unlink("/nonexistent"));
      termios settings{};
      expect_refused(::tcgetattr(0, &settings));
    });
  }
}

TEST(ThreadFilter, WhatTheyDoGoesOn) {
  const base::UniqueFd event(::eventfd(0, EFD_CLOEXEC));
  confined(ThreadKind::kVcpu, [&] {
    const uint64_t one = 1;
    EXPECT_EQ(::write(event.get(), &one, sizeof one), ssize_t{sizeof one});
    // KVM's own are let through: the descriptor is what is wrong here.
    EXPECT_EQ(::ioctl(event.get(), KVM_RUN, 0), -1);
    EXPECT_NE(errno, EPERM);
    EXPECT_EQ(std::string(1 << 20, 'x').size(), size_t{1} << 20);
    EXPECT_THROW(throw std::runtime_error("caught"), std::runtime_error);
  });
  int ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  const base::UniqueFd first(ends[0]), second(ends[1]);
  confined(ThreadKind::kSerial, [&] {
    EXPECT_EQ(::send(first.get(), "x", 1, MSG_NOSIGNAL), 1);
    char byte = 0;
    EXPECT_EQ(::recv(second.get(), &byte, 1, 0), 1);
    expect_refused(::ioctl(first.get(), KVM_RUN, 0));
  });
}

TEST(ThreadFilter, OnlyTheThreadItselfIsConfined) {
  confined(ThreadKind::kVcpu, [] { expect_refused(::open("/dev/null", O_RDONLY)); });
  EXPECT_TRUE(base::UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC)));
}

}  // namespace
}  // namespace minivmm::vmm
