// SPDX-License-Identifier: Apache-2.0
// Bytes of a node that are read where they lie in memory, without a copy (Handle::lend).
//
// While a loan lasts the bytes stay where they are, and are what the node holds there: changes of
// the range show through, and nothing else is put there. For that it pins what a request pins, so
// whoever drains, resizes or reuses freed clusters waits for it: it is given back before its holder
// waits for anything, on the loop that took it.
//
// Only the kernel may look at the bytes, as the argument of a system call that sends or writes
// them: where the file was cut short behind our back, or its device fails, that call fails with
// EFAULT, and we would die.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include "base/epoch.h"

namespace minivmm::block {

class Loan {
 public:
  Loan() = default;
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;
  ~Loan() = default;

  // Null: nothing is lent.
  const std::byte* data() const noexcept { return data_; }
  void give_back() noexcept {
    data_ = nullptr;
    while (pins_ > 0) held_[--pins_].release();
  }

  // For those who lend. False: the chain of nodes is longer than is worth it.
  bool pin(base::Epoch::Pin pin) noexcept {
    if (pins_ == held_.size()) return false;
    held_[pins_++] = std::move(pin);
    return true;
  }
  // The last step: what `data` points to is the range that was asked for.
  void lend(const std::byte* data) noexcept { data_ = data; }

 private:
  const std::byte* data_ = nullptr;
  size_t pins_ = 0;
  std::array<base::Epoch::Pin, 6> held_;
};

}  // namespace minivmm::block
