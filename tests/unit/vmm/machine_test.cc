// SPDX-License-Identifier: Apache-2.0
// The machine with guests of a few instructions, entered in 32-bit mode by PVH. Needs KVM of any
// kind; skipped only where /dev/kvm does not exist.
#include "vmm/machine.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "tests/unit/vmm/elf_builder.h"
#include "vmm/host_probe.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

using namespace std::chrono_literals;
using test::TestElf;

class MachineTest : public testing::Test {
 protected:
  void SetUp() override {
    if (::access("/dev/kvm", F_OK) != 0) GTEST_SKIP() << "no /dev/kvm";
  }

  MachineConfig config(std::vector<uint8_t> code) {
    kernel_ = TestElf(std::move(code)).bytes();
    MachineConfig out;
    out.memory_bytes = uint64_t{16} << 20;
    out.kernel.bytes = kernel_;
    out.serial.on_output = [this](std::span<const std::byte> bytes) {
      std::lock_guard lock(mutex_);
      for (const auto byte : bytes) output_.push_back(static_cast<char>(byte));
    };
    return out;
  }

  ExitReason run(std::vector<uint8_t> code) {
    Machine machine(config(std::move(code)));
    machine.start();
    if (!machine.wait_for(10s)) ADD_FAILURE() << "the guest did not end";
    machine.stop();
    return machine.wait();
  }

  std::vector<std::byte> kernel_;
  std::mutex mutex_;
  std::string output_;
};

constexpr uint8_t kHlt = 0xf4;

TEST_F(MachineTest, GuestExitHasItsStatus) {
  // mov $42, %eax; out %eax, $0xf4; hlt
  const ExitReason reason = run({0xb8, 42, 0, 0, 0, 0xe7, 0xf4, kHlt});
  EXPECT_EQ(reason.kind, ExitKind::kGuestExit);
  EXPECT_EQ(reason.status, 42);
  EXPECT_EQ(reason.exit_status(), 42);
}

TEST_F(MachineTest, KeyboardControllerResets) {
  // mov $0xfe, %al; out %al, $0x64; hlt
  EXPECT_EQ(run({0xb0, 0xfe, 0xe6, 0x64, kHlt}).kind, ExitKind::kReset);
}

TEST_F(MachineTest, PowerRegistersResetAndSwitchOff) {
  // mov $0x600, %dx; mov $VALUE, %al; out %al, %dx; hlt
  EXPECT_EQ(run({0x66, 0xba, 0x00, 0x06, 0xb0, 0x01, 0xee, kHlt}).kind, ExitKind::kReset);
  EXPECT_EQ(run({0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, kHlt}).kind, ExitKind::kPowerOff);
}

// An empty IDT makes any exception a triple fault.
TEST_F(MachineTest, TripleFaultIsACrashUnlessExpected) {
  const ExitReason reason = run({0x0f, 0x0b});
  EXPECT_EQ(reason.kind, ExitKind::kCrash);
  EXPECT_EQ(reason.exit_status(), kCrashStatus);
  EXPECT_NE(reason.text.find("rip"), std::string::npos) << reason.text;

  auto expected = config({0x0f, 0x0b});
  expected.triple_fault_is_reset = true;
  Machine machine(std::move(expected));
  machine.start();
  EXPECT_EQ(machine.wait().kind, ExitKind::kReset);
}

TEST_F(MachineTest, SerialOutputArrivesBeforeTheEnd) {
  // mov $0x3f8, %dx; mov $'h', %al; out %al, %dx; mov $'i', %al; out %al, %dx; then exit 0
  const ExitReason reason =
      run({0x66, 0xba, 0xf8, 0x03, 0xb0, 'h', 0xee, 0xb0, 'i', 0xee, 0x31, 0xc0, 0xe7, 0xf4, kHlt});
  EXPECT_EQ(reason.status, 0);
  EXPECT_EQ(output_, "hi");
}

TEST_F(MachineTest, StringOutputIsManyAccesses) {
  // mov $0x200020, %esi; mov $5, %ecx; mov $0x3f8, %dx; cld; rep outsb; exit 0
  std::vector<uint8_t> code = {0xbe, 0x20, 0x00, 0x20, 0x00, 0xb9, 5,    0,    0,    0,    0x66,
                               0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e, 0x31, 0xc0, 0xe7, 0xf4, kHlt};
  code.resize(0x20);
  for (const char c : std::string("burst")) code.push_back(static_cast<uint8_t>(c));
  run(std::move(code));
  EXPECT_EQ(output_, "burst");
}

TEST_F(MachineTest, TypedBytesReachTheGuest) {
  // 1: mov $0x3fd, %dx; in %dx, %al; test $1, %al; jz 1b; mov $0x3f8, %dx; in %dx, %al;
  // movzbl %al, %eax; out %eax, $0xf4; hlt
  auto machine_config = config({0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66,
                                0xba, 0xf8, 0x03, 0xec, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt});
  Machine machine(std::move(machine_config));
  machine.start();
  machine.type("K");
  ASSERT_TRUE(machine.wait_for(10s));
  EXPECT_EQ(machine.wait().status, 'K');
}

TEST_F(MachineTest, UnclaimedAddressesReadAsOnes) {
  // mov 0xd0000000, %al; movzbl %al, %eax; out %eax, $0xf4
  EXPECT_EQ(run({0xa0, 0x00, 0x00, 0x00, 0xd0, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt}).status, 0xff);
  // in $0xe9, %al; ...
  EXPECT_EQ(run({0xe4, 0xe9, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt}).status, 0xff);
  // CMOS and keyboard status must not read as ones: guests would wait for them.
  EXPECT_EQ(run({0xe4, 0x71, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt}).status, 0);
  EXPECT_EQ(run({0xe4, 0x64, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt}).status, 0);
}

class Window final : public BusDevice {
 public:
  void read(uint64_t offset, std::span<std::byte> data) override {
    data[0] = static_cast<std::byte>(offset + data.size());
  }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    written_offset = offset;
    written_size = data.size();
    written_first = std::to_integer<int>(data[0]);
  }
  std::atomic<uint64_t> written_offset{0};
  std::atomic<uint64_t> written_size{0};
  std::atomic<int> written_first{-1};
};

TEST_F(MachineTest, MmioDevicesAnswerAndAreNamedOnTheCommandLine) {
  // movl $0x33, 0xd0000010; mov 0xd0000020, %al; movzbl %al, %eax; out %eax, $0xf4
  auto machine_config = config({0xc7, 0x05, 0x10, 0x00, 0x00, 0xd0, 0x33, 0x00, 0x00, 0x00, 0xa0,
                                0x20, 0x00, 0x00, 0xd0, 0x0f, 0xb6, 0xc0, 0xe7, 0xf4, kHlt});
  machine_config.command_line = "job=info";
  Machine machine(std::move(machine_config));
  Window window;
  const MmioSlot slot = machine.allocate_slot();
  EXPECT_EQ(slot.base, kVirtioWindowBase);
  EXPECT_EQ(slot.gsi, 5u);
  machine.add_mmio_device("disk", slot, window);
  machine.start();
  EXPECT_EQ(machine.wait().status, 0x21);
  EXPECT_EQ(window.written_offset, 0x10u);
  EXPECT_EQ(window.written_size, 4u);
  EXPECT_EQ(window.written_first, 0x33);
  EXPECT_STREQ(reinterpret_cast<const char*>(machine.memory().at(kCommandLineAddress, 64)),
               "job=info virtio_mmio.device=4K@0xd0000000:5");
}

// Linux with hardware-reduced ACPI jumps there when it is not told how to reset.
TEST_F(MachineTest, TheResetVectorResets) {
  Machine machine(config({kHlt, 0xeb, 0xfd}));
  machine.start();
  const std::byte* code = machine.memory().at(kResetVectorAddress, 16);
  constexpr uint8_t kWanted[] = {0xb0, 0x01, 0xba, 0x00, 0x06, 0xee};  // out %al, 1 to 0x600
  EXPECT_EQ(std::memcmp(code, kWanted, sizeof kWanted), 0);
}

// The probe guest reads no ACPI and finds an MP table; a kernel that does finds the disks there.
TEST_F(MachineTest, FirmwareTablesAreThereForTheKernelsThatReadThem) {
  for (const DeviceListing listing : {DeviceListing::kAcpi, DeviceListing::kCommandLine}) {
    auto machine_config = config({kHlt, 0xeb, 0xfd});
    machine_config.device_listing = listing;
    Machine machine(std::move(machine_config));
    Window window;
    machine.add_mmio_device("disk", machine.allocate_slot(), window);
    machine.start();
    const bool acpi = listing == DeviceListing::kAcpi;
    EXPECT_EQ(std::memcmp(machine.memory().at(kAcpiAddress, 8), "RSD PTR ", 8) == 0, acpi);
    EXPECT_EQ(std::memcmp(machine.memory().at(kMpTableAddress, 4), "_MP_", 4), 0);
    machine.stop();
    EXPECT_EQ(machine.wait().kind, ExitKind::kStopped);
  }
}

TEST_F(MachineTest, IoeventfdTakesMatchingWritesOnly) {
  // movl $1, 0xd0000050; movl $2, 0xd0000050; out 0
  auto machine_config =
      config({0xc7, 0x05, 0x50, 0x00, 0x00, 0xd0, 1, 0,    0,    0,    0xc7, 0x05, 0x50,
              0x00, 0x00, 0xd0, 2,    0,    0,    0, 0x31, 0xc0, 0xe7, 0xf4, kHlt});
  Machine machine(std::move(machine_config));
  Window window;
  machine.add_mmio_device("disk", machine.allocate_slot(), window);
  const base::UniqueFd event(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  machine.connect_ioeventfd(event.get(), kVirtioWindowBase + 0x50, 4, 1);
  EXPECT_THROW(machine.connect_ioeventfd(event.get(), kVirtioWindowBase + 0x50, 4, 1), base::Error);
  machine.start();
  EXPECT_EQ(machine.wait().status, 0);
  uint64_t count = 0;
  ASSERT_EQ(::read(event.get(), &count, sizeof count), 8);
  EXPECT_EQ(count, 1u);
  EXPECT_EQ(window.written_first, 2);
  machine.disconnect_ioeventfd(event.get(), kVirtioWindowBase + 0x50, 4, 1);
}

TEST_F(MachineTest, SlotsEndAtTheLastInterruptLine) {
  Machine machine(config({kHlt}));
  for (unsigned i = 0; i < kVirtioSlots; ++i) EXPECT_EQ(machine.allocate_slot().gsi, 5 + i);
  EXPECT_THROW((void)machine.allocate_slot(), base::Error);
}

TEST_F(MachineTest, RefusesOverlapsAndLateDevices) {
  Machine machine(config({kHlt}));
  Window window;
  const MmioSlot slot = machine.allocate_slot();
  machine.add_mmio_device("a", slot, window);
  EXPECT_THROW(machine.add_mmio_device("b", slot, window), base::Error);
  EXPECT_THROW(machine.add_mmio_device("c", {0x1000, 0x1000, 6}, window), base::Error);
  EXPECT_THROW(machine.add_port_device("d", 0x3f8, 1, window), base::Error);
  machine.start();
  EXPECT_THROW(machine.add_mmio_device("e", machine.allocate_slot(), window), base::Error);
  EXPECT_THROW(machine.start(), base::Error);
}

// jmp . with interrupts off, and hlt for ever: neither may keep stop() from ending.
TEST_F(MachineTest, StopsAGuestThatNeverYields) {
  for (const auto& code :
       {std::vector<uint8_t>{0xeb, 0xfe}, std::vector<uint8_t>{kHlt, 0xeb, 0xfd}}) {
    Machine machine(config(code));
    machine.start();
    EXPECT_FALSE(machine.wait_for(50ms));
    const auto begin = std::chrono::steady_clock::now();
    machine.stop();
    EXPECT_EQ(machine.wait().kind, ExitKind::kStopped);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 2s);
  }
}

TEST_F(MachineTest, StopsAllVcpus) {
  auto machine_config = config({0xeb, 0xfe});
  machine_config.vcpus = 2;
  Machine machine(std::move(machine_config));
  machine.start();
  EXPECT_FALSE(machine.wait_for(20ms));
  machine.stop();
  EXPECT_EQ(machine.wait().kind, ExitKind::kStopped);
}

TEST_F(MachineTest, StopBeforeStartWins) {
  Machine machine(config({0xeb, 0xfe}));
  machine.stop();
  machine.start();
  EXPECT_EQ(machine.wait().kind, ExitKind::kStopped);
  EXPECT_EQ(machine.counters().exits, 0u);
}

TEST_F(MachineTest, CanBeDestroyedInAnyState) {
  { Machine machine(config({0xeb, 0xfe})); }
  {
    Machine machine(config({0xeb, 0xfe}));
    machine.start();
  }
  {
    Machine machine(config({0xeb, 0xfe}));
    machine.start();
    machine.stop();
  }
}

// Stops at random moments around the start, from another thread: no hang, no lost stop.
TEST_F(MachineTest, StopsAtRandomMoments) {
  for (int i = 0; i < 40; ++i) {
    Machine machine(config({0xeb, 0xfe}));
    std::thread stopper([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(i * 50));
      machine.stop();
      machine.stop();
    });
    machine.start();
    EXPECT_EQ(machine.wait().kind, ExitKind::kStopped);
    stopper.join();
  }
}

TEST_F(MachineTest, TheFirstReasonCounts) {
  Machine machine(config({0xb8, 3, 0, 0, 0, 0xe7, 0xf4, kHlt}));
  machine.start();
  ASSERT_TRUE(machine.wait_for(10s));
  machine.stop();
  EXPECT_EQ(machine.wait().kind, ExitKind::kGuestExit);
  EXPECT_EQ(machine.wait().status, 3) << "asking again gives the same";
}

TEST_F(MachineTest, EndedFdBecomesAndStaysReadable) {
  Machine machine(config({0xb8, 0, 0, 0, 0, 0xe7, 0xf4, kHlt}));
  pollfd wait{machine.ended_fd(), POLLIN, 0};
  EXPECT_EQ(::poll(&wait, 1, 0), 0);
  machine.start();
  EXPECT_EQ(::poll(&wait, 1, 10000), 1);
  EXPECT_EQ(::poll(&wait, 1, 0), 1);
  EXPECT_TRUE(machine.ended());
}

TEST_F(MachineTest, SharedMemoryIsVisibleThroughItsDescriptor) {
  auto machine_config = config({kHlt, 0xeb, 0xfd});
  machine_config.shared_memory = true;
  machine_config.command_line = "through the file";
  Machine machine(std::move(machine_config));
  machine.start();
  char text[16] = {};
  ASSERT_EQ(::pread(machine.memory_fd(), text, sizeof text, kCommandLineAddress), 16);
  EXPECT_EQ(std::string(text, 16), "through the file");
}

TEST_F(MachineTest, SaysWhatIsWrongWithTheConfiguration) {
  const auto error_of = [](MachineConfig bad, bool start) {
    try {
      Machine machine(std::move(bad));
      if (start) machine.start();
    } catch (const base::Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  auto no_kernel = config({kHlt});
  no_kernel.kernel = {};
  EXPECT_NE(error_of(no_kernel, true).find("no kernel"), std::string::npos);
  auto missing = config({kHlt});
  missing.kernel.bytes = {};
  missing.kernel.path = "/nonexistent/vmlinux";
  EXPECT_NE(error_of(missing, true).find("/nonexistent/vmlinux"), std::string::npos);
  auto initrd = config({kHlt});
  initrd.initrd_path = "/nonexistent/initrd";
  EXPECT_NE(error_of(initrd, true).find("/nonexistent/initrd"), std::string::npos);
  auto no_cpu = config({kHlt});
  no_cpu.vcpus = 0;
  EXPECT_NE(error_of(no_cpu, false).find("vCPU"), std::string::npos);
  auto no_memory = config({kHlt});
  no_memory.memory_bytes = 4096;
  EXPECT_NE(error_of(no_memory, false).find("memory"), std::string::npos);
}

TEST(HostProbe, AgreesWithWhetherAMachineCanBeMade) {
  const HostProbe probe = probe_host();
  bool made = false;
  try {
    const std::vector<std::byte> kernel = TestElf({kHlt}).bytes();
    MachineConfig config;
    config.memory_bytes = uint64_t{16} << 20;
    config.kernel.bytes = kernel;
    Machine machine(std::move(config));
    made = true;
  } catch (const base::Error&) {
  }
  EXPECT_EQ(probe.kind != KvmKind::kNone, made) << probe.problem;
  EXPECT_EQ(probe.problem.empty(), made);
  if (!made) {
    EXPECT_FALSE(probe.advice.empty());
    return;
  }
  EXPECT_EQ(probe.api_version, 12);
  EXPECT_TRUE(probe.missing.empty());
  EXPECT_GE(probe.max_vcpus, 1);
  // Hardware runs a system call; without it, a host that claims it does would be news.
  ASSERT_TRUE(probe.guest_syscalls.has_value());
  if (probe.kind == KvmKind::kHardware) {
    EXPECT_TRUE(*probe.guest_syscalls);
  }
}

}  // namespace
}  // namespace minivmm::vmm
