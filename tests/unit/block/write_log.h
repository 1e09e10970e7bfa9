// SPDX-License-Identifier: Apache-2.0
// Reads what the log-writes filter recorded, and makes the states that a power loss could have left
// from it: everything before the last flush before the cut, of what follows any part, by sectors.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace minivmm::block {

class WriteLog {
 public:
  struct Entry {
    uint64_t position;  // in the log, bytes: where the entry begins
    uint64_t offset;    // in the file, bytes
    uint64_t length;
    uint64_t flags;
    uint64_t data;  // where its data lies in the log; of writes
  };

  // Throws std::runtime_error for what is no whole log.
  explicit WriteLog(std::vector<std::byte> bytes);

  const std::vector<Entry>& entries() const noexcept { return entries_; }

  // The state of a file that held `start`, cut before entries()[cut].
  std::vector<std::byte> after_power_loss(std::vector<std::byte> start, size_t cut,
                                          std::mt19937_64& random) const;

 private:
  void apply(const Entry& entry, uint64_t from, uint64_t to, std::vector<std::byte>& out) const;

  std::vector<std::byte> bytes_;
  std::vector<Entry> entries_;
};

}  // namespace minivmm::block
