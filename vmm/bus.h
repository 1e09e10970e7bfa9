// SPDX-License-Identifier: Apache-2.0
// The two address spaces in which a guest reaches devices: ports and memory-mapped windows. A Bus
// maps ranges to devices. It does not own the devices: whoever adds one keeps it alive until the
// machine has ended. Ranges are added while the machine is built, by one thread; after that the
// map is immutable and vCPU threads look up without a lock.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace minivmm::vmm {

// Called on vCPU threads, on several at once: a device locks for itself. Offsets count from the
// start of the device's range; offset + data.size() never passes its end. `data` holds 1, 2, 4 or
// 8 bytes, little-endian. Must not throw and must not wait for the guest.
class BusDevice {
 public:
  virtual ~BusDevice() = default;
  virtual void read(uint64_t offset, std::span<std::byte> data) = 0;
  virtual void write(uint64_t offset, std::span<const std::byte> data) = 0;
};

class Bus {
 public:
  // `name` stands in errors: "ports", "mmio".
  explicit Bus(std::string name) : name_(std::move(name)) {}
  Bus(const Bus&) = delete;
  Bus& operator=(const Bus&) = delete;

  // Throws base::Error: EINVAL for an empty or wrapping range, EBUSY where it overlaps another one,
  // naming both.
  void add(uint64_t base, uint64_t size, std::string_view device_name, BusDevice& device);

  // False if no device claims the whole access; `data` is then untouched.
  bool read(uint64_t address, std::span<std::byte> data) const;
  bool write(uint64_t address, std::span<const std::byte> data) const;

 private:
  struct Range {
    uint64_t base;
    uint64_t last;  // inclusive, so that the end of the address space can be named
    std::string name;
    BusDevice* device;
  };

  const Range* find(uint64_t address, size_t length) const;

  std::string name_;
  std::vector<Range> ranges_;  // sorted by base
};

}  // namespace minivmm::vmm
