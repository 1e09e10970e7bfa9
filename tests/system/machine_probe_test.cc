// SPDX-License-Identifier: Apache-2.0
// The probe guest under our machine, without disks.
#include <gtest/gtest.h>

#include "tests/system/machine_guest.h"
#include "tests/system/probe_text.h"

namespace minivmm::test {
namespace {

using vmm::ExitKind;

class MachineProbeTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!kvm_exists()) GTEST_SKIP() << "no /dev/kvm";
  }
};

TEST_F(MachineProbeTest, InfoEndsWithStatusZero) {
  MachineGuest guest("job=info");
  guest.start();
  const auto reason = guest.finish();
  EXPECT_EQ(reason.kind, ExitKind::kGuestExit) << reason.text;
  EXPECT_EQ(reason.status, 0);
  const auto info = results(guest.output(), "info");
  ASSERT_EQ(info.size(), 1u) << guest.output();
  EXPECT_EQ(info[0].value("disks"), "0");
  EXPECT_GT(info[0].number("memory"), uint64_t{100} << 20);
  EXPECT_GT(info[0].number("tsc_khz"), 100000u);
}

TEST_F(MachineProbeTest, StatusTellsFailedJobsAndBadCommandLines) {
  {
    MachineGuest guest("job=read:disk=3");
    guest.start();
    EXPECT_EQ(guest.finish().status, 1) << guest.output();
    EXPECT_NE(guest.output().find("no such disk"), std::string::npos);
  }
  {
    MachineGuest guest("virtio_mmio.device=nonsense job=info");
    guest.start();
    EXPECT_EQ(guest.finish().status, 2) << guest.output();
  }
}

// A window without a device behind it must be an error line, not a hang.
TEST_F(MachineProbeTest, AnEmptyWindowIsReported) {
  MachineGuest guest("virtio_mmio.device=4K@0xd0000000:5 job=info");
  guest.start();
  EXPECT_EQ(guest.finish().status, 1);
  EXPECT_NE(guest.output().find("no virtio magic"), std::string::npos) << guest.output();
}

TEST_F(MachineProbeTest, ShellRunsWhatIsTyped) {
  MachineGuest guest("job=shell");
  guest.start();
  ASSERT_TRUE(guest.expect("probe: shell\n")) << guest.output();
  EXPECT_NE(guest.command("info").find("ok disks=0"), std::string::npos) << guest.output();
  EXPECT_NE(guest.command("nonsense").find("no such job"), std::string::npos);
  // Backspace takes a character back.
  guest.machine().type("idxx\b\ble 0.01\n");
  EXPECT_TRUE(guest.expect("probe: idle ok")) << guest.output();
  // More than the UART's FIFO holds, in one go.
  EXPECT_NE(guest.command("nosuchjob" + std::string(300, 'x')).find("no such job"),
            std::string::npos);
  guest.machine().type("exit 7\n");
  const auto reason = guest.finish();
  EXPECT_EQ(reason.kind, ExitKind::kGuestExit);
  EXPECT_EQ(reason.status, 7);
}

// Rates that the probe prints are only worth something if its clock is right. The interrupt-driven
// sleep is tested by the way.
TEST_F(MachineProbeTest, ItsClockIsRight) {
  MachineGuest guest("job=shell");
  guest.start();
  ASSERT_TRUE(guest.expect("probe: shell\n")) << guest.output();
  const auto begin = std::chrono::steady_clock::now();
  const std::string line = guest.command("idle 1");
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  ASSERT_FALSE(line.empty()) << guest.output();
  EXPECT_GE(took.count(), 0.99) << line;
  EXPECT_LT(took.count(), 2.0) << line;
}

TEST_F(MachineProbeTest, StopsWhileItSleeps) {
  MachineGuest guest("job=shell", 2);
  guest.start();
  ASSERT_TRUE(guest.expect("probe: shell\n")) << guest.output();
  guest.machine().stop();
  EXPECT_EQ(guest.finish().kind, ExitKind::kStopped);
}

}  // namespace
}  // namespace minivmm::test
