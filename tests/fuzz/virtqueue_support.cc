// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <optional>
#include <utility>

#include "base/log.h"
#include "tests/fuzz/virtqueue_device.h"
#include "virtio/mmio_transport.h"
#include "virtio/rng_device.h"

namespace minivmm::virtio {
namespace {

constexpr uint64_t kSmallDisk = 512 << 10;
constexpr uint64_t kLargeDisk = 1 << 20;

const char* disk_name(uint8_t disk) {
  switch (disk) {
    case FuzzChoices::kSlow:
      return "slow";
    case FuzzChoices::kFailing:
      return "failing";
    default:
      return "plain";
  }
}

class FuzzBlock final : public FuzzDevice {
 public:
  FuzzBlock(FuzzChoices choices, const GuestMemory& memory, int irqfd)
      : name_(disk_name(choices.disk)) {
    FuzzWorld& world = FuzzWorld::instance();
    // Resized while the device uses it.
    using block::Permissions;
    constexpr uint8_t kAll = Permissions::kWrite | Permissions::kResize;
    resizer_ = attach("resizer", {.uses = kAll, .shares = kAll});
    block::Handle handle = attach(
        "guest",
        {.uses = choices.read_only ? uint8_t{0} : uint8_t{Permissions::kWrite}, .shares = kAll});
    BlockOptions options;
    options.name = name_;
    options.num_queues = kFuzzQueues;
    options.queue_size = 16;
    options.legacy = choices.legacy;
    options.read_only = choices.read_only;
    if (choices.disk == FuzzChoices::kLargeBlocks) options.logical_block_size = 4096;
    device_ = std::make_unique<MmioBlock>(std::move(handle), memory, options,
                                          std::vector<base::EventLoop*>{&world.loop()}, irqfd);
  }

  void read(uint64_t offset, std::span<std::byte> data) override { device_->read(offset, data); }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    device_->write(offset, data);
  }
  void resize() override {
    small_ = !small_;
    FuzzWorld::instance().loop().call(
        "resize", [this] { resizer_->truncate(small_ ? kSmallDisk : kLargeDisk); });
    device_->resize();
  }
  std::vector<std::string> describe() const override { return device_->describe(); }
  bool stop() override {
    const bool idle = device_->stop(std::chrono::seconds(10)).idle;
    if (idle && small_) resize();
    return idle;
  }

 private:
  block::Handle attach(const char* who, block::Permissions permissions) {
    FuzzWorld& world = FuzzWorld::instance();
    return world.loop().call("attach",
                             [&] { return world.graph().attach(name_, who, permissions); });
  }

  const std::string name_;
  std::optional<block::Handle> resizer_;
  bool small_ = false;
  std::unique_ptr<MmioBlock> device_;
};

class FuzzEntropy final : public FuzzDevice {
 public:
  FuzzEntropy(FuzzChoices choices, const GuestMemory& memory, int irqfd)
      : device_(memory, FuzzWorld::instance().loop(), "rng", irqfd),
        transport_(device_, device_.signals(), "rng", choices.legacy) {}

  void read(uint64_t offset, std::span<std::byte> data) override { transport_.read(offset, data); }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    transport_.write(offset, data);
  }
  void resize() override {}
  std::vector<std::string> describe() const override {
    return {transport_.describe(), device_.describe()};
  }
  bool stop() override {
    device_.stop();
    return true;
  }

 private:
  RngDevice device_;
  MmioTransport transport_;
};

}  // namespace

FuzzWorld::FuzzWorld() {
  base::set_log_level(base::LogLevel::kOff);
  loop().call("open", [this] {
    for (const char* keys :
         {"driver=memory,node-name=plain,size=1M",
          "driver=fault,node-name=slow,delay-ns=20000,file.driver=memory,file.size=1M",
          "driver=fault,node-name=failing,errno=EIO,offset=256K,length=256K,file.driver=memory,"
          "file.size=1M"}) {
      (void)graph_.add(block::Options::from_keys(keys));
    }
  });
}

FuzzWorld& FuzzWorld::instance() {
  static auto* const instance = new FuzzWorld;
  return *instance;
}

void FuzzWorld::settle() {
  for (int i = 0; i < 4; ++i) {
    loop().call("settle", [] { base::EventLoop::current()->yield(); });
  }
}

std::unique_ptr<FuzzDevice> make_fuzz_device(FuzzChoices choices, const GuestMemory& memory,
                                             int irqfd) {
  if (choices.entropy) return std::make_unique<FuzzEntropy>(choices, memory, irqfd);
  return std::make_unique<FuzzBlock>(choices, memory, irqfd);
}

}  // namespace minivmm::virtio
