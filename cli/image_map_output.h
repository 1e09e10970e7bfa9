// SPDX-License-Identifier: Apache-2.0
// The output of `image map`: as qemu-img writes it, and as a picture. Pure.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <vector>

namespace minivmm::cli {

// A range of a disk, of one kind.
struct MapEntry {
  uint64_t start = 0;
  uint64_t length = 0;
  uint32_t depth = 0;  // of the layer that determines it
  bool present = false;
  bool zero = false;
  bool data = false;
  bool compressed = false;
  bool unknown = false;                           // it is in a backing file that was not opened
  std::optional<uint64_t> offset = std::nullopt;  // in that layer's file
  std::string file = {};
};

// True if `next` continues `entry`; they are one then.
bool merge(MapEntry& entry, const MapEntry& next);

// A line of the table, or nothing where there is nothing to say of it. Throws ENOTSUP, in
// qemu-img's words, for data that is at no place of a file.
std::string map_line(const MapEntry& entry);
std::string map_header();
// One object, without what separates it from others.
std::string map_json(const MapEntry& entry);

// A picture: a bar a layer, what it holds by kind and place. `layers` are their names, the
// uppermost first; `size` is the disk's.
std::string map_svg(const std::vector<MapEntry>& entries, const std::vector<std::string>& layers,
                    uint64_t size);

}  // namespace minivmm::cli
