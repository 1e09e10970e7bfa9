// SPDX-License-Identifier: Apache-2.0
// File systems and containers that a system may be on and that are not looked into, by what they
// begin with.
#pragma once

#include <string_view>

#include "bootdisk/byte_source.h"
#include "bootdisk/partitions.h"

namespace minivmm::bootdisk {

// "XFS", "an LVM physical volume"; empty for what is not known, or cannot be read.
std::string_view foreign_content(ByteSource& disk, const Volume& volume) noexcept;

}  // namespace minivmm::bootdisk
