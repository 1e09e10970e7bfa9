// SPDX-License-Identifier: Apache-2.0
#include "vmm/console.h"

#include <fcntl.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include <gtest/gtest.h>
#include <pty.h>
#include <termios.h>

#include "base/error.h"
#include "vmm/terminal.h"

namespace minivmm::vmm {
namespace {

using namespace std::chrono_literals;

template <typename Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 500; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

uint8_t read_register(Serial& serial, uint64_t offset) {
  std::byte value{};
  serial.read(offset, std::span(&value, 1));
  return std::to_integer<uint8_t>(value);
}

struct Pipe {
  Pipe() {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) == 0) {
      read.reset(fds[0]);
      write.reset(fds[1]);
    }
  }
  // So that nothing more goes in, and what is put into a console stays in its ring.
  void fill() const {
    ASSERT_EQ(::fcntl(write.get(), F_SETFL, O_NONBLOCK), 0);
    const std::vector<char> filler(65536);
    while (::write(write.get(), filler.data(), filler.size()) > 0) {
    }
    ASSERT_EQ(::fcntl(write.get(), F_SETFL, 0), 0);
  }
  base::UniqueFd read;
  base::UniqueFd write;
};

TEST(Console, CarriesOutputToADescriptor) {
  Pipe pipe;
  Console console({.in_fd = -1, .out_fd = pipe.write.get(), .on_output = {}}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  const std::string text = "from the guest";
  console.put(std::as_bytes(std::span(text)));
  console.stop();
  char buffer[64] = {};
  EXPECT_EQ(::read(pipe.read.get(), buffer, sizeof buffer), static_cast<ssize_t>(text.size()));
  EXPECT_EQ(std::string(buffer), text);
}

// A guest writes byte by byte, and a thread that is woken for each costs more than the guest's
// exit.
TEST(Console, BytesAreCollected) {
  std::atomic<size_t> calls{0};
  std::atomic<size_t> bytes{0};
  Console console({.in_fd = -1,
                   .out_fd = -1,
                   .on_output =
                       [&](std::span<const std::byte> some) {
                         ++calls;
                         bytes += some.size();
                       }},
                  [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  constexpr size_t kBytes = 400;
  const std::byte one{'x'};
  for (size_t i = 0; i < kBytes; ++i) {
    console.put(std::span(&one, 1));
    const auto until = std::chrono::steady_clock::now() + 25us;
    while (std::chrono::steady_clock::now() < until) {
    }
  }
  // Also the last ones, behind which nothing comes.
  EXPECT_TRUE(eventually([&] { return bytes.load() == kBytes; }));
  EXPECT_LT(calls.load(), kBytes / 4);
  console.stop();
}

// A pipe that nobody reads: the guest is told to wait, then loses bytes, and stop() still ends.
TEST(Console, AStuckReaderNeitherBlocksTheGuestNorTheEnd) {
  Pipe pipe;
  pipe.fill();
  Console console({.in_fd = -1, .out_fd = pipe.write.get(), .on_output = {}}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  const std::string text(4096, 'x');
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 64; ++i) console.put(std::as_bytes(std::span(text)));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 500ms);
  EXPECT_GT(console.dropped(), 0u);
  EXPECT_FALSE(console.ready());
  EXPECT_TRUE(eventually([&] { return console.ready(); })) << "after a second it gives up waiting";
  const auto stop_begin = std::chrono::steady_clock::now();
  console.stop();
  EXPECT_LT(std::chrono::steady_clock::now() - stop_begin, 3s);
}

TEST(Console, ATransmitterThatWaitedIsWoken) {
  Pipe pipe;
  pipe.fill();
  std::atomic<int> interrupts{0};
  Console console({.in_fd = -1, .out_fd = pipe.write.get(), .on_output = {}}, [] {});
  Serial serial(console, [&] { ++interrupts; });
  console.attach(serial);
  console.start();
  const std::string text(Console::kRingBytes, 'x');
  console.put(std::as_bytes(std::span(text)));
  ASSERT_EQ(read_register(serial, 5) & 0x20, 0) << "busy";
  const std::byte enable{0x02};
  serial.write(1, std::span(&enable, 1));
  EXPECT_EQ(interrupts.load(), 0);
  std::vector<char> sink(1 << 20);
  EXPECT_TRUE(eventually([&] {
    (void)!::read(pipe.read.get(), sink.data(), sink.size());
    return interrupts.load() > 0;
  }));
  pipe.read.reset();
  console.stop();
}

// A tty driver sends the next byte only after an interrupt; without one its user would wait for
// ever.
TEST(Console, ATransmitterThatWaitsIsToldWhenBytesAreDropped) {
  Pipe pipe;
  pipe.fill();
  std::atomic<int> interrupts{0};
  Console console({.in_fd = -1, .out_fd = pipe.write.get(), .on_output = {}}, [] {});
  Serial serial(console, [&] { ++interrupts; });
  console.attach(serial);
  console.start();
  const std::string text(Console::kRingBytes, 'x');
  console.put(std::as_bytes(std::span(text)));
  const std::byte enable{0x02};
  serial.write(1, std::span(&enable, 1));
  EXPECT_EQ(interrupts.load(), 0) << "busy";
  EXPECT_TRUE(eventually([&] { return interrupts.load() > 0; }));
  // And so on for the next ones.
  const int before = interrupts.load();
  const std::byte letter{'y'};
  serial.write(0, std::span(&letter, 1));
  EXPECT_GT(interrupts.load(), before);
  console.stop();
}

// poll() has seen a byte, but the read blocks: another reader of the same pipe took it. Here a
// socket does so by itself, whose reads wait for more.
TEST(Console, AnInputWhoseReadBlocksDoesNotHoldUpTheEnd) {
  int fds[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  const base::UniqueFd read(fds[0]);
  const base::UniqueFd write(fds[1]);
  const int at_least = 100;
  ASSERT_EQ(::setsockopt(read.get(), SOL_SOCKET, SO_RCVLOWAT, &at_least, sizeof at_least), 0);
  Console console({.in_fd = read.get(), .out_fd = -1, .on_output = {}}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  ASSERT_EQ(::write(write.get(), "x", 1), 1);
  std::this_thread::sleep_for(50ms);
  // Should the end hang after all, this ends the test.
  std::atomic<bool> stopped{false};
  std::thread rescue([&] {
    if (eventually([&] { return stopped.load(); })) return;
    (void)!::write(write.get(), std::string(200, 'x').data(), 200);
  });
  const auto begin = std::chrono::steady_clock::now();
  console.stop();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 3s);
  stopped = true;
  rescue.join();
}

TEST(Console, InputLargerThanTheFifoArrivesWhole) {
  Console console({}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  std::string text;
  for (int i = 0; i < 1000; ++i) text.push_back(static_cast<char>('a' + i % 26));
  console.type(text);
  std::string got;
  EXPECT_TRUE(eventually([&] {
    while ((read_register(serial, 5) & 1) != 0) {
      got.push_back(static_cast<char>(read_register(serial, 0)));
    }
    return got.size() == text.size();
  }));
  EXPECT_EQ(got, text);
  console.stop();
}

TEST(Console, RefusesInputWithoutBound) {
  Console console({}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  EXPECT_THROW(console.type(std::string(Console::kRingBytes + 1, 'x')), base::Error);
}

class TerminalTest : public testing::Test {
 protected:
  void SetUp() override {
    int master = -1;
    int slave = -1;
    if (::openpty(&master, &slave, nullptr, nullptr, nullptr) != 0) GTEST_SKIP() << "no pty";
    master_.reset(master);
    slave_.reset(slave);
  }
  bool is_raw() const {
    termios settings{};
    ::tcgetattr(slave_.get(), &settings);
    return (settings.c_lflag & (ICANON | ECHO | ISIG)) == 0;
  }
  void press(std::string_view keys) { (void)!::write(master_.get(), keys.data(), keys.size()); }

  base::UniqueFd master_;
  base::UniqueFd slave_;
};

TEST_F(TerminalTest, IsRawWhileTheConsoleRunsAndRestoredAfter) {
  Console console({.in_fd = slave_.get(), .out_fd = -1, .on_output = {}}, [] {});
  Serial serial(console, [] {});
  console.attach(serial);
  EXPECT_FALSE(is_raw());
  console.start();
  EXPECT_TRUE(is_raw());
  console.stop();
  EXPECT_FALSE(is_raw());
}

TEST_F(TerminalTest, CtrlAXQuitsAndOtherKeysPass) {
  std::atomic<int> quits{0};
  Console console({.in_fd = slave_.get(), .out_fd = -1, .on_output = {}}, [&] { ++quits; });
  Serial serial(console, [] {});
  console.attach(serial);
  console.start();
  press(
      "a\x01\x01"
      "b\x01z\x03");
  std::string got;
  EXPECT_TRUE(eventually([&] {
    while ((read_register(serial, 5) & 1) != 0) {
      got.push_back(static_cast<char>(read_register(serial, 0)));
    }
    return got.size() == 6;
  }));
  EXPECT_EQ(got,
            "a\x01"
            "b\x01z\x03");
  EXPECT_EQ(quits.load(), 0);
  press("\x01x");
  EXPECT_TRUE(eventually([&] { return quits.load() == 1; }));
  console.stop();
}

// A crash must not leave the user with a terminal that does not echo.
TEST_F(TerminalTest, IsRestoredWhenTheProcessDies) {
  EXPECT_DEATH(
      {
        const RawTerminal raw(slave_.get());
        if (!is_raw()) ::_exit(0);
        ::abort();
      },
      "");
  EXPECT_FALSE(is_raw());
}

TEST_F(TerminalTest, IsRestoredByExit) {
  EXPECT_EXIT(
      {
        new RawTerminal(slave_.get());
        ::exit(is_raw() ? 7 : 8);
      },
      testing::ExitedWithCode(7), "");
  EXPECT_FALSE(is_raw());
}

// For an end that does not run destructors, and for Ctrl-C while the end hangs.
TEST_F(TerminalTest, IsGivenBackOnRequest) {
  const RawTerminal raw(slave_.get());
  ASSERT_TRUE(is_raw());
  restore_terminal();
  EXPECT_FALSE(is_raw());
  restore_terminal();
  EXPECT_FALSE(is_raw());
}

TEST_F(TerminalTest, HasOneUserAtATime) {
  const RawTerminal raw(slave_.get());
  EXPECT_THROW(RawTerminal(slave_.get()), base::Error);
  EXPECT_TRUE(is_raw());
}

}  // namespace
}  // namespace minivmm::vmm
