// SPDX-License-Identifier: Apache-2.0
// Threads that do I/O, confined: what would go wrong here is a request that fails with EPERM, or a
// thread that can still open a file. Each test is a process of its own, because what is confined
// stays so.
#include "base/io_threads.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <string>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <thread>

#include <gtest/gtest.h>

#include "base/call_filter.h"
#include "base/io.h"
#include "base/loop_group.h"
#include "base/pool.h"
#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

void expect(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "not so: %s (errno %d)\n", what, errno);
  std::_Exit(1);
}

void expect_refused(int64_t result, const char* what) {
  expect(result == -1 && errno == EPERM, what);
}

void expect_nothing_new() {
  expect_refused(::open("/dev/null", O_RDONLY), "open is refused");
  expect_refused(::socket(AF_UNIX, SOCK_STREAM, 0), "socket is refused");
  expect_refused(::execl("/bin/true", "true", nullptr), "exec is refused");
  expect_refused(::unlink("/nonexistent"), "unlink is refused");
  io_uring_params params{};
  expect_refused(::syscall(SYS_io_uring_setup, 1, &params), "a new ring is refused");
  expect_refused(::fork(), "fork is refused");
}

void confine_loops(LoopGroup& loops) {
  confine_io_threads();
  for (size_t i = 0; i < loops.size(); ++i) {
    EventLoop& loop = loops.loop(i);
    loop.call("confine", [&loop] { confine_io_thread(IoThread::kLoop, loop.name()); });
  }
}

// I/O on what is open, by the backend that is given.
void check_loop(BackendChoice backend) {
  {
    const UniqueFd file(::memfd_create("io", MFD_CLOEXEC));
    LoopGroup loops(2, backend);
    // Before: a pool thread that exists already is confined too.
    loops.loop(0).call("warm up", [] { Pool::syscalls().run([] {}); });
    confine_loops(loops);
    loops.loop(0).call("I/O", [&] {
      std::array<char, 4> data{'d', 'a', 't', 'a'};
      iovec iov{data.data(), data.size()};
      expect(io::write_at(file.get(), IoSpan(std::span(&iov, 1)), 0) == 4, "a write");
      expect(io::fsync(file.get(), true) == 0, "a flush");
      data.fill(0);
      expect(io::read_at(file.get(), IoSpan(std::span(&iov, 1)), 0) == 4 && data[3] == 'a',
             "a read");
      expect_nothing_new();
      Pool::syscalls().run([] { expect_nothing_new(); });
      Pool::work().run([&] {
        expect_nothing_new();
        expect_refused(::lseek(file.get(), 0, SEEK_END), "no files for a work thread");
      });
      // A pool whose threads are first made now, by a confined one.
      Pool fresh("fresh", 1);
      fresh.run([&] {
        expect_nothing_new();
        expect(::lseek(file.get(), 0, SEEK_END) == 4, "a seek");
      });
      // What has to be opened later.
      Pool::errands().run([] {
        const UniqueFd opened(::open("/dev/null", O_RDONLY | O_CLOEXEC));
        expect(bool(opened), "errands open");
      });
    });
    // The thread that asked for it is not confined.
    expect(bool(UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC))), "others open");
  }
  std::_Exit(0);  // loops ended, with rings unregistered and threads joined
}

class IoThreads : public testing::TestWithParam<BackendChoice> {};

INSTANTIATE_TEST_SUITE_P(Backends, IoThreads,
                         testing::Values(BackendChoice::kUring, BackendChoice::kEpoll),
                         [](const auto& param) {
                           return param.param == BackendChoice::kUring ? "uring" : "epoll";
                         });

TEST_P(IoThreads, WorkWithWhatIsOpenAndOpenNothing) {
  if (!CallFilter::in_effect()) GTEST_SKIP() << "sanitizers need more than a filter allows";
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(check_loop(GetParam()), testing::ExitedWithCode(0), "");
}

TEST(IoThreads, ThoseThatTellTheKernelOfPagesDoNothingElse) {
  if (!CallFilter::in_effect()) GTEST_SKIP() << "sanitizers need more than a filter allows";
  const auto body = [] {
    confine_io_threads();
    std::thread([] {
      confine_io_thread(IoThread::kPages, "pages");
      expect_nothing_new();
      expect_refused(::lseek(0, 0, SEEK_CUR), "no files");
    }).join();
    std::_Exit(0);
  };
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(body(), testing::ExitedWithCode(0), "");
}

// Without a daemon's word (image commands) nothing changes.
TEST(IoThreads, AreAsBeforeWhereNobodyAsked) {
  ASSERT_FALSE(io_threads_are_confined());
  std::thread([] {
    confine_io_thread(IoThread::kLoop, "test");
    EXPECT_TRUE(UniqueFd(::open("/dev/null", O_RDONLY | O_CLOEXEC)));
  }).join();
}

}  // namespace
}  // namespace minivmm::base
