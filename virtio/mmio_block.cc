// SPDX-License-Identifier: Apache-2.0
#include "virtio/mmio_block.h"

#include <mutex>
#include <utility>

#include "base/log.h"
#include "virtio/block_device.h"
#include "virtio/mmio_transport.h"

namespace minivmm::virtio {
namespace {

constexpr std::chrono::seconds kDestructorTimeout{10};

// Devices whose disk hangs: their requests still run and refer to them, so they live as long as the
// process.
void abandon(std::unique_ptr<BlockDevice> device, std::unique_ptr<MmioTransport> transport) {
  using Orphan = std::pair<std::unique_ptr<BlockDevice>, std::unique_ptr<MmioTransport>>;
  static std::mutex mutex;
  static auto* const orphans = new std::vector<Orphan>;
  const std::lock_guard lock(mutex);
  orphans->emplace_back(std::move(device), std::move(transport));
}

}  // namespace

MmioBlock::MmioBlock(block::Handle disk, const GuestMemory& memory, BlockOptions options,
                     std::vector<base::EventLoop*> loops, int irqfd)
    : device_(std::make_unique<BlockDevice>(std::move(disk), memory, std::move(options),
                                            std::move(loops), irqfd)),
      transport_(std::make_unique<MmioTransport>(
          *device_, device_->signals(), device_->options().name, device_->options().legacy)) {}

MmioBlock::~MmioBlock() {
  if (stopped_) {
    if (!idle_) abandon(std::move(device_), std::move(transport_));
    return;
  }
  const StopReport report = stop(kDestructorTimeout);
  if (!report.error.empty()) base::log_error("{}: {}", device_->options().name, report.error);
  for (const std::string& line : report.in_flight) base::log_error("{}: still in flight", line);
  if (!idle_) abandon(std::move(device_), std::move(transport_));
}

uint16_t MmioBlock::queue_count() const noexcept { return device_->queue_count(); }

int MmioBlock::notify_fd(uint16_t queue) const noexcept { return device_->notify_fd(queue); }

void MmioBlock::read(uint64_t offset, std::span<std::byte> data) { transport_->read(offset, data); }

void MmioBlock::write(uint64_t offset, std::span<const std::byte> data) {
  transport_->write(offset, data);
}

void MmioBlock::resize() { device_->resize(); }
void MmioBlock::resume() noexcept { device_->resume(); }

StopReport MmioBlock::stop(std::chrono::milliseconds timeout) {
  StopReport report;
  report.idle = idle_;
  if (std::exchange(stopped_, true)) return report;
  report = device_->stop(timeout);
  idle_ = report.idle;
  return report;
}

std::vector<std::string> MmioBlock::describe() const {
  std::vector<std::string> lines = device_->describe();
  lines.insert(lines.begin(), transport_->describe());
  return lines;
}

}  // namespace minivmm::virtio
