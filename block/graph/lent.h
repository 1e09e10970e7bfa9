// SPDX-License-Identifier: Apache-2.0
// What was lent (loan.h) stays mapped, so that lending it again costs little, and counts as memory
// of this process.
#pragma once

namespace minivmm::block {

// Gives that up, for all nodes: when nobody borrows for a while. What is lent stays right. Any
// thread; it may take some milliseconds for each GiB.
void forget_lent() noexcept;

}  // namespace minivmm::block
