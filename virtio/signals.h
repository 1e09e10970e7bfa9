// SPDX-License-Identifier: Apache-2.0
// What a device tells its driver: interrupts with their causes, the device status, and the
// generation of the configuration space. Lock-free: written by the loops that run queues, read by
// vCPU threads.
#pragma once

#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace minivmm::virtio {

class Signals {
 public:
  // `irqfd` is borrowed: each write of it is an interrupt.
  explicit Signals(int irqfd) noexcept : irqfd_(irqfd) {}

  void used_buffers() noexcept { interrupt(VIRTIO_MMIO_INT_VRING); }

  // Called with the configuration already changed, and before it can be read.
  void next_generation() noexcept { generation_.fetch_add(1, std::memory_order_release); }
  // Tells a driver that runs.
  void config_changed() noexcept {
    if ((status() & VIRTIO_CONFIG_S_DRIVER_OK) != 0) interrupt(VIRTIO_MMIO_INT_CONFIG);
  }
  // The device has given up until the driver resets it.
  void needs_reset() noexcept {
    status_.fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, std::memory_order_acq_rel);
    config_changed();
  }

  uint32_t interrupt_status() const noexcept {
    return interrupt_status_.load(std::memory_order_acquire);
  }
  void acknowledge(uint32_t bits) noexcept {
    interrupt_status_.fetch_and(~bits, std::memory_order_acq_rel);
  }
  uint32_t generation() const noexcept { return generation_.load(std::memory_order_acquire); }

  // The device status; only the transport adds what the driver wrote.
  uint32_t status() const noexcept { return status_.load(std::memory_order_acquire); }
  void add_status(uint32_t bits) noexcept { status_.fetch_or(bits, std::memory_order_acq_rel); }
  // After a reset, with the device idle.
  void clear() noexcept {
    status_.store(0, std::memory_order_release);
    interrupt_status_.store(0, std::memory_order_release);
  }

  uint64_t interrupts() const noexcept { return interrupts_.load(std::memory_order_relaxed); }

 private:
  void interrupt(uint32_t cause) noexcept {
    // The cause first: the driver's handler may run before write() returns.
    interrupt_status_.fetch_or(cause, std::memory_order_acq_rel);
    interrupts_.fetch_add(1, std::memory_order_relaxed);
    const uint64_t one = 1;
    // Fails only if the counter is full, and then an interrupt is pending anyway.
    (void)!::write(irqfd_, &one, sizeof one);
  }

  const int irqfd_;
  std::atomic<uint32_t> status_{0};
  std::atomic<uint32_t> interrupt_status_{0};
  std::atomic<uint32_t> generation_{0};
  std::atomic<uint64_t> interrupts_{0};
};

}  // namespace minivmm::virtio
