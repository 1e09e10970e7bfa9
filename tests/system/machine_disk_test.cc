// SPDX-License-Identifier: Apache-2.0
// The probe guest under our machine with our virtio disks: real driver, real interrupts, real
// notifications, and a look at the image from outside afterwards.
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "base/loop_group.h"
#include "block/graph/graph.h"
#include "tests/system/machine_guest.h"
#include "tests/system/probe_text.h"
#include "tests/system/stress_check.h"
#include "virtio/mmio_block.h"

namespace minivmm::test {
namespace {

using vmm::ExitKind;

// A disk's device in a window of the machine.
class Slot final : public vmm::BusDevice {
 public:
  Slot(vmm::Machine& machine, block::Handle handle, virtio::BlockOptions options,
       std::vector<base::EventLoop*> loops)
      : irqfd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        device_(std::move(handle), machine.memory(), std::move(options), std::move(loops),
                irqfd_.get()) {
    const vmm::MmioSlot slot = machine.allocate_slot();
    machine.add_mmio_device("disk", slot, *this);
    machine.connect_irqfd(irqfd_.get(), slot.gsi);
    for (uint16_t q = 0; q < device_.queue_count(); ++q) {
      machine.connect_ioeventfd(device_.notify_fd(q), slot.base + virtio::MmioBlock::kNotifyOffset,
                                4, q);
    }
  }
  void read(uint64_t offset, std::span<std::byte> data) override { device_.read(offset, data); }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    device_.write(offset, data);
  }
  virtio::MmioBlock& device() { return device_; }

 private:
  base::UniqueFd irqfd_;
  virtio::MmioBlock device_;
};

class MachineDiskTest : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = uint64_t{16} << 20;

  void SetUp() override {
    if (!kvm_exists()) GTEST_SKIP() << "no /dev/kvm";
    std::string pattern = (std::filesystem::temp_directory_path() / "minivmm-disk-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ / "disk.raw";
    std::ofstream(path_).close();
    std::filesystem::resize_file(path_, kBytes);
  }

  template <typename Body>
  auto on_fiber(Body&& body) {
    return loops_->loop(0).call("test", std::forward<Body>(body));
  }

  void TearDown() override {
    if (slot_) {
      EXPECT_TRUE(slot_->device().stop(std::chrono::seconds(10)).idle);
    }
    slot_.reset();
    guest_.reset();
    if (loops_) on_fiber([this] { graph_.close(); });
    std::filesystem::remove_all(folder_);
  }

  // Runs the jobs on a guest with one disk; the image is closed afterwards.
  vmm::ExitReason run(const std::string& command_line, virtio::BlockOptions options = {}) {
    loops_ = std::make_unique<base::LoopGroup>(2);
    guest_ = std::make_unique<MachineGuest>(command_line);
    block::Handle handle = on_fiber([&] {
      graph_.add(
          block::Options::from_keys("driver=file,node-name=disk,filename=" + path_.string()));
      return graph_.attach("disk", "guest", block::Permissions::front_end(true));
    });
    slot_ =
        std::make_unique<Slot>(guest_->machine(), std::move(handle), std::move(options),
                               std::vector<base::EventLoop*>{&loops_->loop(0), &loops_->loop(1)});
    guest_->start();
    const auto reason = guest_->finish();
    EXPECT_TRUE(slot_->device().stop(std::chrono::seconds(10)).idle);
    slot_.reset();
    on_fiber([this] { graph_.remove("disk"); });
    return reason;
  }

  std::filesystem::path folder_;
  std::filesystem::path path_;
  std::unique_ptr<base::LoopGroup> loops_;
  block::Graph graph_;
  std::unique_ptr<MachineGuest> guest_;
  std::unique_ptr<Slot> slot_;
};

std::string sha256_of(const std::filesystem::path& path) {
  const std::string command = "sha256sum " + path.string();
  FILE* pipe = ::popen(command.c_str(), "r");
  std::array<char, 65> digest{};
  const size_t n = pipe == nullptr ? 0 : std::fread(digest.data(), 1, 64, pipe);
  if (pipe != nullptr) ::pclose(pipe);
  return n == 64 ? std::string(digest.data()) : std::string();
}

TEST_F(MachineDiskTest, EveryJobWorks) {
  const auto reason =
      run("job=info,errors,write:random:seed=5,verify:random:seed=5,flush,read,"
          "zero:offset=1M:length=2M,verify:zero:offset=1M:length=2M,"
          "zero:offset=4M:length=64K:unmap,verify:zero:offset=4M:length=64K,"
          "discard:offset=8M:length=1M,reset,wce:off,wce:on,write:text=hello:length=512,"
          "bench:randread:count=500,bench:randwrite:count=500:poll,survey");
  EXPECT_EQ(reason.kind, ExitKind::kGuestExit) << reason.text;
  EXPECT_EQ(reason.status, 0) << guest_->output();
}

TEST_F(MachineDiskTest, ReadsWhatTheHostHasInTheFile) {
  {
    std::ofstream out(path_, std::ios::binary | std::ios::in);
    for (unsigned i = 0; i < kBytes / 4; ++i) {
      const unsigned word = i * 2654435761u;
      out.write(reinterpret_cast<const char*>(&word), sizeof word);
    }
  }
  const std::string wanted = sha256_of(path_);
  ASSERT_FALSE(wanted.empty());
  run("job=read:bs=256K:segments=7");
  const auto lines = results(guest_->output(), "read");
  ASSERT_EQ(lines.size(), 1u) << guest_->output();
  EXPECT_EQ(lines[0].value("sha256"), wanted);
}

struct StressCase {
  const char* name;
  const char* words;  // on the command line
  const char* options;
  uint16_t queues;
};

class MachineStressTest : public MachineDiskTest, public testing::WithParamInterface<StressCase> {};

TEST_P(MachineStressTest, LeavesExactlyWhatItWrote) {
  const StressCase& test = GetParam();
  virtio::BlockOptions options;
  options.num_queues = test.queues;
  const auto reason = run(
      std::string(test.words) + " job=stress:17:20:count=1500:zeroes:discards:unmap" + test.options,
      options);
  EXPECT_EQ(reason.status, 0) << guest_->output();
  const auto lines = results(guest_->output(), "stress");
  ASSERT_EQ(lines.size(), 1u) << guest_->output();
  EXPECT_TRUE(lines[0].ok) << lines[0].text;
  StressCheck check;
  check.parameters.seed = 17;
  check.parameters.blocks = kBytes / 4096;
  check.parameters.zeroes = true;
  check.parameters.discards = true;
  check.durable = check.issued = lines[0].number("last");
  check.started_empty = true;
  EXPECT_EQ(check.issued, 1500u);
  const auto problems = check_stress(check, read_file(path_.string()));
  EXPECT_TRUE(problems.empty()) << problems.front();
}

INSTANTIATE_TEST_SUITE_P(
    Ways, MachineStressTest,
    testing::Values(StressCase{"interrupts", "", ":depth=32", 1},
                    StressCase{"polling", "", ":depth=32:poll", 1},
                    StressCase{"direct_descriptors", "", ":depth=32:indirect=off:segments=5", 1},
                    StressCase{"no_event_idx", "disable=event_idx", ":depth=16", 1},
                    StressCase{"no_event_idx_polling", "disable=event_idx,indirect",
                               ":depth=16:poll", 1},
                    StressCase{"one_at_a_time", "", ":depth=1", 1},
                    StressCase{"four_queues", "", ":depth=64", 4}),
    [](const auto& way) { return std::string(way.param.name); });

}  // namespace
}  // namespace minivmm::test
