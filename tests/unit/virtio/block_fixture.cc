// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/virtio/block_fixture.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "base/bytes.h"

namespace minivmm::virtio {

std::vector<std::byte> pattern(size_t bytes, uint8_t seed) {
  std::vector<std::byte> out(bytes);
  uint32_t x = seed + 1U;
  for (std::byte& b : out) {
    x = x * 1664525 + 1013904223;
    b = static_cast<std::byte>(x >> 24);
  }
  return out;
}

BlockTest::BlockTest(base::BackendChoice backend)
    : loops_(2, backend), irq_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

BlockTest::~BlockTest() {
  if (node_) node_->release();
  if (device_) stop();
  device_.reset();
  on_fiber([&] { graph_.close(); });
}

void BlockTest::make(BlockOptions options, std::shared_ptr<TestNode> node) {
  node_ = node ? std::move(node) : std::make_shared<TestNode>(kDiskBytes);
  options.name = "disk0";
  block::Handle handle = on_fiber([&] {
    graph_.adopt(node_);
    return graph_.attach("disk0", "guest", block::Permissions::front_end(!node_->read_only()));
  });
  device_ = std::make_unique<MmioBlock>(
      std::move(handle), guest_.memory(), std::move(options),
      std::vector<base::EventLoop*>{&loops_.loop(0), &loops_.loop(1)}, irq_.get());
}

void BlockTest::stop() {
  const StopReport report = device_->stop(std::chrono::seconds(10));
  EXPECT_TRUE(report.idle) << (report.in_flight.empty() ? "" : report.in_flight.front());
  device_.reset();
}

uint32_t BlockTest::get(uint64_t offset) {
  std::byte data[4];
  device_->read(offset, data);
  return base::load_le<uint32_t>(data);
}

void BlockTest::set(uint64_t offset, uint32_t value) {
  std::byte data[4];
  base::store_le(data, value);
  device_->write(offset, data);
}

uint64_t BlockTest::offered() {
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
  const uint64_t low = get(VIRTIO_MMIO_DEVICE_FEATURES);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 1);
  return low | uint64_t{get(VIRTIO_MMIO_DEVICE_FEATURES)} << 32;
}

void BlockTest::start(uint64_t features, uint16_t queue_size) {
  features |= feature(VIRTIO_F_VERSION_1);
  uint32_t bits = 0;
  set(VIRTIO_MMIO_STATUS, 0);
  set(VIRTIO_MMIO_STATUS, bits |= VIRTIO_CONFIG_S_ACKNOWLEDGE);
  set(VIRTIO_MMIO_STATUS, bits |= VIRTIO_CONFIG_S_DRIVER);
  set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
  set(VIRTIO_MMIO_DRIVER_FEATURES, static_cast<uint32_t>(features));
  set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
  set(VIRTIO_MMIO_DRIVER_FEATURES, static_cast<uint32_t>(features >> 32));
  set(VIRTIO_MMIO_STATUS, bits |= VIRTIO_CONFIG_S_FEATURES_OK);
  ASSERT_EQ(status(), bits);
  queues_.clear();
  used_.clear();
  for (uint16_t q = 0; q < device_->queue_count(); ++q) {
    set(VIRTIO_MMIO_QUEUE_SEL, q);
    const auto size =
        queue_size != 0 ? queue_size : static_cast<uint16_t>(get(VIRTIO_MMIO_QUEUE_NUM_MAX));
    queues_.push_back(
        std::make_unique<DriverQueue>(guest_, size, (features & feature(VIRTIO_F_EVENT_IDX)) != 0));
    used_.emplace_back(size);
    const QueueLayout& layout = queues_.back()->layout();
    set(VIRTIO_MMIO_QUEUE_NUM, size);
    const auto set_address = [&](uint64_t low, uint64_t address) {
      set(low, static_cast<uint32_t>(address));
      set(low + 4, static_cast<uint32_t>(address >> 32));
    };
    set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, layout.descriptors);
    set_address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, layout.available);
    set_address(VIRTIO_MMIO_QUEUE_USED_LOW, layout.used);
    set(VIRTIO_MMIO_QUEUE_READY, 1);
  }
  set(VIRTIO_MMIO_STATUS, bits |= VIRTIO_CONFIG_S_DRIVER_OK);
  ASSERT_EQ(status(), kDriverOk);
}

Pending BlockTest::add(uint32_t type, uint64_t sector, std::span<const Buffer> data, uint16_t queue,
                       bool indirect) {
  const uint64_t header = guest_.allocate(16);
  guest_.store<uint32_t>(header, type);
  guest_.store<uint32_t>(header + 4, 0);
  guest_.store<uint64_t>(header + 8, sector);
  Pending p{.queue = queue, .status = guest_.allocate(1, 1)};
  guest_.store<uint8_t>(p.status, kUnanswered);
  std::vector<Buffer> buffers{{header, 16, false}};
  buffers.insert(buffers.end(), data.begin(), data.end());
  buffers.push_back({p.status, 1, true});
  p.head = indirect ? queues_[queue]->add_indirect(buffers) : queues_[queue]->add(buffers);
  used_[queue][p.head] = false;
  return p;
}

Pending BlockTest::add_read(uint64_t sector, uint32_t bytes, uint16_t queue) {
  const uint64_t data = guest_.allocate(bytes, 512);
  const Buffer buffer[] = {{data, bytes, true}};
  Pending p = add(VIRTIO_BLK_T_IN, sector, buffer, queue);
  p.data = data;
  p.bytes = bytes;
  return p;
}

Pending BlockTest::add_write(uint64_t sector, std::span<const std::byte> data, uint16_t queue) {
  const uint64_t address = guest_.allocate(data.size(), 512);
  std::copy(data.begin(), data.end(), guest_.at(address, data.size()));
  const Buffer buffer[] = {{address, static_cast<uint32_t>(data.size()), false}};
  return add(VIRTIO_BLK_T_OUT, sector, buffer, queue);
}

void BlockTest::kick(uint16_t queue) {
  if (!queues_[queue]->publish()) return;
  set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
}

unsigned BlockTest::take_used(unsigned count, uint16_t queue) {
  unsigned taken = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  for (;;) {
    while (const auto used = queues_[queue]->take_used()) {
      EXPECT_LT(used->id, queues_[queue]->size());
      used_[queue][used->id] = true;
      last_used_.push_back(*used);
      ++taken;
    }
    if (taken >= count || std::chrono::steady_clock::now() > end) return taken;
    queues_[queue]->want_interrupt_after(0);
    if (!queues_[queue]->used_pending()) (void)wait_interrupt(std::chrono::milliseconds(1000));
  }
}

uint8_t BlockTest::wait(const Pending& request) {
  while (!used_[request.queue][request.head]) {
    if (take_used(1, request.queue) == 0) {
      ADD_FAILURE() << "a request was not answered within 5 s";
      for (const std::string& line : device_->describe()) ADD_FAILURE() << line;
      return kUnanswered;
    }
  }
  return status_of(request);
}

uint8_t BlockTest::run(uint32_t type, uint64_t sector, std::span<const Buffer> data) {
  const Pending p = add(type, sector, data);
  kick();
  return wait(p);
}

uint8_t BlockTest::read(uint64_t sector, std::span<std::byte> to) {
  const Pending p = add_read(sector, static_cast<uint32_t>(to.size()));
  kick();
  const uint8_t result = wait(p);
  const auto data = guest_.bytes(p.data, to.size());
  std::copy(data.begin(), data.end(), to.begin());
  return result;
}

uint8_t BlockTest::write(uint64_t sector, std::span<const std::byte> from) {
  const Pending p = add_write(sector, from);
  kick();
  return wait(p);
}

uint32_t BlockTest::wait_interrupt(std::chrono::milliseconds timeout) {
  pollfd fd{.fd = irq_.get(), .events = POLLIN, .revents = 0};
  if (::poll(&fd, 1, static_cast<int>(timeout.count())) != 1) return 0;
  (void)take_interrupts();
  const uint32_t causes = get(VIRTIO_MMIO_INTERRUPT_STATUS);
  set(VIRTIO_MMIO_INTERRUPT_ACK, causes);
  return causes;
}

uint64_t BlockTest::take_interrupts() {
  uint64_t count = 0;
  return ::read(irq_.get(), &count, sizeof count) == sizeof count ? count : 0;
}

}  // namespace minivmm::virtio
