// SPDX-License-Identifier: Apache-2.0
// The entries of a grub.cfg. Not an interpreter of GRUB's language: of each `menuentry` it takes
// the title and the commands linux and initrd, with variables that the environment block has.
#pragma once

#include <string>
#include <string_view>

#include <map>
#include <vector>

#include "bootdisk/boot_entry.h"

namespace minivmm::bootdisk {

using Variables = std::map<std::string, std::string, std::less<>>;

// In the order of the file; an entry without a kernel is left out. At most kMaxEntries.
std::vector<BootEntry> parse_grub_config(std::string_view text, const Variables& variables);
inline constexpr size_t kMaxEntries = 256;

// A grubenv file: lines NAME=VALUE behind a header.
Variables parse_grub_environment(std::string_view text);

// `text` with $name and ${name} replaced; unknown ones vanish, as in GRUB.
std::string expand(std::string_view text, const Variables& variables);

}  // namespace minivmm::bootdisk
