// SPDX-License-Identifier: Apache-2.0
#include "vmm/loader.h"

#include <errno.h>
#include <string.h>
#include <string_view>

#include <algorithm>
#include <cstring>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "vmm/bzimage.h"
#include "vmm/elf_image.h"
#include "vmm/layout.h"
#include "vmm/linux_boot.h"
#include "vmm/memory_map.h"
#include "vmm/pvh.h"

namespace minivmm::vmm {
namespace {

constexpr uint64_t kVmlinuxInitrdMax = 0x7fffffff;

// Kernels split at blanks.
bool has_word(std::string_view text, std::string_view word) {
  for (size_t at = 0; (at = text.find(word, at)) != std::string_view::npos; ++at) {
    const size_t end = at + word.size();
    if ((at == 0 || text[at - 1] == ' ') && (end == text.size() || text[end] == ' ')) return true;
  }
  return false;
}

class Loader {
 public:
  Loader(const LoadRequest& request, const virtio::GuestMemory& memory)
      : request_(request),
        memory_(memory),
        map_(make_memory_map(request.ram_size)),
        low_end_(low_ram_end(request.ram_size)) {}

  BootState run() {
    const ImageReader& kernel = *request_.kernel;
    if (looks_like_elf(kernel)) return load_elf();
    if (looks_like_bzimage(kernel)) return load_bzimage();
    throw base::Error(
        EINVAL, fmt::format("{}: not a kernel: neither ELF (vmlinux) nor bzImage", kernel.name()));
  }

 private:
  std::span<std::byte> guest(uint64_t address, uint64_t length, const char* what) const {
    std::byte* host = memory_.at(address, length);
    if (host == nullptr) {
      throw base::Error(
          EFAULT,
          fmt::format("{}: {}: {} bytes at {:#x} are not in guest RAM ({} MiB); give "
                      "the guest more memory",
                      request_.kernel->name(), what, length, address, request_.ram_size >> 20));
    }
    return {host, length};
  }

  bool wants_acpi(bool known) const {
    switch (request_.listing) {
      case DeviceListing::kAcpi:
        return true;
      case DeviceListing::kCommandLine:
        return false;
      default:
        return known && !has_word(request_.command_line, "acpi=off");
    }
  }

  bool occurs(const ElfImage& elf, std::string_view text) const {
    return std::any_of(elf.segments.begin(), elf.segments.end(), [&](const ElfSegment& segment) {
      if (segment.file_size == 0) return false;
      const auto bytes = guest(segment.address, segment.file_size, "ELF segment");
      return ::memmem(bytes.data(), bytes.size(), text.data(), text.size()) != nullptr;
    });
  }

  BootState load_elf() {
    const ElfImage elf = parse_elf(*request_.kernel);
    if (elf.lowest < kKernelAddress) {
      throw base::Error(EINVAL,
                        fmt::format("{}: wants to be loaded at {:#x}, where the boot tables "
                                    "are; link it at or above 1 MiB",
                                    request_.kernel->name(), elf.lowest));
    }
    if (request_.protocol == BootProtocol::kPvh && !elf.pvh_entry) {
      throw base::Error(EINVAL, fmt::format("{}: has no PVH entry note", request_.kernel->name()));
    }
    for (const auto& segment : elf.segments) {
      const auto target = guest(segment.address, segment.memory_size, "ELF segment");
      request_.kernel->read(segment.file_offset, target.first(segment.file_size), "ELF segment");
      // The rest is zero already: guest RAM is fresh.
    }
    acpi_ = wants_acpi(occurs(elf, "RSD PTR "));
    if (elf.pvh_entry && request_.protocol != BootProtocol::kLinux64) {
      load_initrd(elf.end, low_end_ - 1);
      return enter_pvh(*elf.pvh_entry);
    }
    if (elf.end > kHoleStart) {
      throw base::Error(EINVAL,
                        fmt::format("{}: ends at {:#x}; the boot page tables map 4 GiB, so it "
                                    "must lie below the device hole",
                                    request_.kernel->name(), elf.end));
    }
    load_initrd(elf.end, kVmlinuxInitrdMax);
    write_command_line(kCommandLineMax - 1);
    return enter_linux(elf.entry, {});
  }

  BootState load_bzimage() {
    const BzImage image = parse_bzimage(*request_.kernel);
    if (request_.protocol == BootProtocol::kPvh) {
      throw base::Error(EINVAL, fmt::format("{}: a bzImage has no PVH entry; use its vmlinux",
                                            request_.kernel->name()));
    }
    acpi_ = wants_acpi(true);
    const auto target = guest(kKernelAddress, image.payload_size, "kernel");
    request_.kernel->read(image.payload_offset, target, "kernel");
    // The kernel unpacks itself at its preferred address and needs init_size bytes there.
    const uint64_t start = std::max(kKernelAddress, image.preferred_address);
    const uint64_t needed = std::max(image.init_size, image.payload_size);
    guest(start, needed, "room to unpack");
    load_initrd(start + needed, image.initrd_address_max);
    write_command_line(image.command_line_max);
    return enter_linux(kKernelAddress + kLinux64EntryOffset, image.setup_header);
  }

  void load_initrd(uint64_t floor, uint64_t address_max) {
    if (request_.initrd == nullptr) return;
    initrd_size_ = request_.initrd->size();
    if (initrd_size_ == 0) {
      throw base::Error(EINVAL, fmt::format("{}: initrd is empty", request_.initrd->name()));
    }
    initrd_address_ = place_initrd(initrd_size_, floor, low_end_, address_max);
    request_.initrd->read(0, guest(initrd_address_, initrd_size_, "initrd"), "initrd");
  }

  void write_command_line(uint64_t max) {
    std::string text = request_.command_line;
    if (!acpi_) text += request_.device_arguments;
    max = std::min(max, kCommandLineMax - 1);
    if (text.size() > max) {
      throw base::Error(EINVAL, fmt::format("command line of {} characters, {} takes at most {}",
                                            text.size(), request_.kernel->name(), max));
    }
    if (text.find('\0') != std::string::npos) {
      throw base::Error(EINVAL, "command line contains a zero byte");
    }
    const auto target = guest(kCommandLineAddress, text.size() + 1, "command line");
    std::memcpy(target.data(), text.c_str(), text.size() + 1);
  }

  BootState enter_pvh(uint32_t entry) {
    write_command_line(kCommandLineMax - 1);
    PvhInput input;
    input.command_line_address = kCommandLineAddress;
    input.initrd_address = initrd_address_;
    input.initrd_size = initrd_size_;
    input.module_list_address = kPvhModuleListAddress;
    input.rsdp_address = acpi_ ? kAcpiAddress : 0;
    input.memory_map_address = kPvhMemoryMapAddress;
    input.memory_map_entries = static_cast<uint32_t>(map_.size());
    fill_pvh_start_info(guest(kPvhStartInfoAddress, kPvhStartInfoBytes, "start_info"), input);
    fill_pvh_module(guest(kPvhModuleListAddress, kPvhModuleBytes, "module list"), input);
    fill_pvh_memory_map(guest(kPvhMemoryMapAddress, map_.size() * kPvhMapEntryBytes, "memory map"),
                        map_);
    return {EntryMode::kProtected32, entry, kPvhStartInfoAddress, acpi_};
  }

  BootState enter_linux(uint64_t entry, std::span<const std::byte> setup_header) {
    ZeroPageInput input;
    input.setup_header = setup_header;
    input.command_line_address = kCommandLineAddress;
    input.initrd_address = initrd_address_;
    input.initrd_size = initrd_size_;
    input.rsdp_address = acpi_ ? kAcpiAddress : 0;
    input.memory_map = map_;
    if (!request_.rng_seed.empty()) {
      input.setup_data_address = kSetupDataAddress;
      fill_rng_seed(guest(kSetupDataAddress, kSetupDataHeaderBytes + request_.rng_seed.size(),
                          "seed of random numbers"),
                    request_.rng_seed);
    }
    fill_zero_page(guest(kZeroPageAddress, kPageSize, "zero page"), input);
    fill_linux_gdt(guest(kGdtAddress, kLinuxGdtBytes, "GDT"));
    fill_identity_tables(guest(kPageTableAddress, kIdentityTableBytes, "page tables"),
                         kPageTableAddress);
    return {EntryMode::kLong64, entry, kZeroPageAddress, acpi_};
  }

  const LoadRequest& request_;
  const virtio::GuestMemory& memory_;
  const std::vector<MemoryMapEntry> map_;
  const uint64_t low_end_;
  uint64_t initrd_address_ = 0;
  uint64_t initrd_size_ = 0;
  bool acpi_ = false;
};

}  // namespace

BootState load_kernel(const LoadRequest& request, const virtio::GuestMemory& memory) {
  return Loader(request, memory).run();
}

}  // namespace minivmm::vmm
