// SPDX-License-Identifier: Apache-2.0
// Partition tables: GPT (UEFI 2.10, chapter 5) and MBR with logical partitions.
#pragma once

#include <string>

#include <cstdint>
#include <vector>

#include "bootdisk/byte_source.h"

namespace minivmm::bootdisk {

// A part of the disk that may hold a file system. Always inside the disk.
struct Volume {
  unsigned number = 0;  // of the partition, as Linux counts; 0: the whole disk
  uint64_t offset = 0;  // bytes
  uint64_t length = 0;
  std::string part_uuid;  // as in root=PARTUUID=; empty for the whole disk
};

// The partitions in the order of their numbers; the whole disk where there is no table. Entries
// that are damaged or reach past the end are left out. Throws what reading throws.
std::vector<Volume> find_volumes(ByteSource& disk);

}  // namespace minivmm::bootdisk
