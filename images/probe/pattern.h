// SPDX-License-Identifier: Apache-2.0
// What write puts on the disk and verify expects there.
#pragma once

#include <cstdint>

#include "options.h"
#include "stamp.h"

namespace minivmm::probe {

// Fills `bytes` (a multiple of 512, or anything for text) at `data` as they belong at `offset`.
void fill_pattern(const Options& options, uint64_t offset, void* data, uint64_t bytes);

// Compares. Returns the number of wrong sectors; `*first` is the byte offset of the first wrong
// byte, or of the first wrong sector for stamps.
uint64_t check_pattern(const Options& options, uint64_t offset, const void* data, uint64_t bytes,
                       uint64_t* first);

}  // namespace minivmm::probe
