// SPDX-License-Identifier: Apache-2.0
#include "vmm/serial.h"

#include <string>

#include <gtest/gtest.h>

namespace minivmm::vmm {
namespace {

class TestOutput final : public SerialOutput {
 public:
  bool ready() override { return is_ready; }
  void put(std::span<const std::byte> bytes) override {
    for (const auto byte : bytes) text.push_back(static_cast<char>(byte));
  }
  bool is_ready = true;
  std::string text;
};

class SerialTest : public testing::Test {
 protected:
  uint8_t in(uint64_t offset) {
    std::byte value{};
    serial.read(offset, std::span(&value, 1));
    return std::to_integer<uint8_t>(value);
  }
  void out(uint64_t offset, uint8_t value) {
    const std::byte byte{value};
    serial.write(offset, std::span(&byte, 1));
  }
  size_t type(std::string_view text) { return serial.receive(std::as_bytes(std::span(text))); }

  TestOutput output;
  int interrupts = 0;
  Serial serial{output, [this] { ++interrupts; }};
};

TEST_F(SerialTest, ResetValuesAreThoseOfA16550) {
  EXPECT_EQ(in(5), 0x60);
  EXPECT_EQ(in(6), 0xb0);
  EXPECT_EQ(in(2), 0x01);
  EXPECT_EQ(in(4), 0x08);
  EXPECT_EQ(in(1), 0x00);
}

// Linux calls it a 16550A only if the FIFO bits follow FCR.
TEST_F(SerialTest, FifoBitsAreThereOnlyWhileEnabled) {
  out(2, 0x01);
  EXPECT_EQ(in(2), 0xc1);
  out(2, 0x00);
  EXPECT_EQ(in(2), 0x01);
}

// A driver's self-test must hear only itself; what was typed meanwhile comes after it.
TEST_F(SerialTest, LoopBackKeepsTheOutsideOut) {
  int drained = 0;
  serial.set_on_drained([&] { ++drained; });
  out(4, 0x10);
  EXPECT_EQ(type("x"), 0u);
  out(0, 'a');
  EXPECT_EQ(in(0), 'a');
  EXPECT_EQ(in(5) & 0x01, 0);
  out(4, 0x08);
  EXPECT_EQ(drained, 1);
  EXPECT_EQ(type("x"), 1u);
  EXPECT_EQ(in(0), 'x');
}

TEST_F(SerialTest, DivisorReplacesDataAndIerWhileDlabIsSet) {
  out(3, 0x83);
  out(0, 0x34);
  out(1, 0x12);
  EXPECT_EQ(in(0), 0x34);
  EXPECT_EQ(in(1), 0x12);
  out(3, 0x03);
  EXPECT_EQ(in(1), 0x00);
  EXPECT_TRUE(output.text.empty());
}

TEST_F(SerialTest, WritesGoOut) {
  for (const char c : std::string("hello")) out(0, static_cast<uint8_t>(c));
  EXPECT_EQ(output.text, "hello");
  EXPECT_EQ(interrupts, 0);
}

// A driver that starts its transmitter by interrupt waits for this edge.
TEST_F(SerialTest, EnablingTheTransmitInterruptRaisesItAtOnce) {
  out(1, 0x02);
  EXPECT_EQ(interrupts, 1);
  EXPECT_EQ(in(2), 0x02);
  EXPECT_EQ(in(2), 0x01) << "reading the cause clears it";
  out(0, 'x');
  EXPECT_EQ(interrupts, 2);
  EXPECT_EQ(in(2), 0x02);
}

TEST_F(SerialTest, ReceivedBytesOutrankTheTransmitter) {
  out(1, 0x03);
  EXPECT_EQ(interrupts, 1);
  EXPECT_EQ(type("ab"), 2u);
  EXPECT_EQ(interrupts, 2);
  EXPECT_EQ(in(2), 0x04);
  EXPECT_EQ(in(5), 0x61);
  EXPECT_EQ(in(0), 'a');
  EXPECT_EQ(in(5) & 1, 1);
  // The transmitter's turn comes with the last byte, or its interrupt would be lost.
  EXPECT_EQ(in(0), 'b');
  EXPECT_EQ(interrupts, 3);
  EXPECT_EQ(in(2), 0x02);
  EXPECT_EQ(in(2), 0x01);
  EXPECT_EQ(in(5), 0x60);
}

TEST_F(SerialTest, EachBurstOfInputRaisesAnInterrupt) {
  out(1, 0x01);
  type("a");
  in(0);
  type("b");
  EXPECT_EQ(interrupts, 2);
}

TEST_F(SerialTest, InputThatDoesNotFitWaitsForRoom) {
  int drained = 0;
  serial.set_on_drained([&] { ++drained; });
  const std::string text(100, 'x');
  EXPECT_EQ(type(text), Serial::kReceiveFifo);
  for (size_t i = 0; i < Serial::kReceiveFifo; ++i) {
    EXPECT_EQ(drained, 0);
    EXPECT_EQ(in(0), 'x');
  }
  EXPECT_EQ(drained, 1);
  EXPECT_EQ(type("y"), 1u);
  EXPECT_EQ(in(0), 'y');
  EXPECT_EQ(drained, 1) << "nobody waited";
}

TEST_F(SerialTest, ClearingTheFifoLetsAWaitingSenderGoOn) {
  int drained = 0;
  serial.set_on_drained([&] { ++drained; });
  type(std::string(100, 'x'));
  out(2, 0x03);
  EXPECT_EQ(drained, 1);
  EXPECT_EQ(in(5) & 1, 0);
}

TEST_F(SerialTest, LoopbackConnectsTheModemLinesAndTheData) {
  out(4, 0x10 | 0x0b);
  EXPECT_EQ(in(6), 0xb0);
  out(4, 0x10 | 0x04);
  EXPECT_EQ(in(6), 0x40);
  out(0, 'z');
  EXPECT_TRUE(output.text.empty());
  EXPECT_EQ(in(0), 'z');
}

// The transmit register must not look empty while the output cannot take more.
TEST_F(SerialTest, IsBusyWhileTheOutputIsFull) {
  output.is_ready = false;
  EXPECT_EQ(in(5), 0x00);
  out(1, 0x02);
  EXPECT_EQ(interrupts, 0);
  output.is_ready = true;
  serial.output_ready();
  EXPECT_EQ(interrupts, 1);
  EXPECT_EQ(in(5), 0x60);
}

TEST_F(SerialTest, LoopbackOverflowIsReportedOnce) {
  out(4, 0x10);
  for (size_t i = 0; i <= Serial::kReceiveFifo; ++i) out(0, 'q');
  EXPECT_EQ(in(5) & 0x02, 0x02);
  EXPECT_EQ(in(5) & 0x02, 0x00);
}

TEST_F(SerialTest, WideAccessesTouchConsecutiveRegisters) {
  const std::array<std::byte, 2> data{std::byte{'w'}, std::byte{0x0f}};
  serial.write(0, data);
  EXPECT_EQ(output.text, "w");
  EXPECT_EQ(in(1), 0x0f);
}

}  // namespace
}  // namespace minivmm::vmm
