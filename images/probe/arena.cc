// SPDX-License-Identifier: Apache-2.0
#include "arena.h"

extern "C" void* memset(void* to, int value, size_t count);
extern "C" char probe_image_end[];

namespace minivmm::probe {
namespace {

constexpr uint64_t kFourGiB = uint64_t{1} << 32;
// Where a loader gives no memory map.
constexpr uint64_t kAssumedEnd = uint64_t{16} << 20;

struct StartInfo {
  uint32_t magic, version, flags, modules;
  uint64_t module_list, command_line, rsdp, memory_map;
  uint32_t memory_map_entries, reserved;
};
struct MapEntry {
  uint64_t address, size;
  uint32_t type, reserved;
};

uint64_t next = 0;
uint64_t end = 0;

}  // namespace

void Arena::start(uint64_t start_info) {
  const auto& info = *reinterpret_cast<const StartInfo*>(start_info);
  const uint64_t image_end = (reinterpret_cast<uint64_t>(probe_image_end) + 4095) & ~uint64_t{4095};
  next = image_end;
  end = kAssumedEnd;
  const auto* map = reinterpret_cast<const MapEntry*>(info.memory_map);
  uint64_t best = 0;
  for (uint32_t i = 0; info.version >= 1 && i < info.memory_map_entries; ++i) {
    if (map[i].type != 1) continue;
    uint64_t from = map[i].address;
    uint64_t to = map[i].address + map[i].size;
    if (to > kFourGiB) to = kFourGiB;
    if (from < image_end) from = image_end;
    if (to <= from || to - from <= best) continue;
    best = to - from;
    next = from;
    end = to;
  }
}

void* Arena::allocate(uint64_t bytes, uint64_t alignment) {
  const uint64_t at = (next + alignment - 1) & ~(alignment - 1);
  if (at > end || bytes > end - at) return nullptr;
  next = at + bytes;
  auto* memory = reinterpret_cast<void*>(at);
  memset(memory, 0, bytes);
  return memory;
}

uint64_t Arena::available() { return end - next; }

Arena::Scope::Scope() : mark_(next) {}
Arena::Scope::~Scope() { next = mark_; }

const char* boot_command_line(uint64_t start_info) {
  const auto& info = *reinterpret_cast<const StartInfo*>(start_info);
  return info.command_line == 0 ? "" : reinterpret_cast<const char*>(info.command_line);
}

}  // namespace minivmm::probe
