// SPDX-License-Identifier: Apache-2.0
// Boot entries in files of lines "key value": the Boot Loader Specification's loader/entries/*.conf
// and extlinux.conf.
#pragma once

#include <string_view>

#include <optional>
#include <vector>

#include "bootdisk/boot_entry.h"
#include "bootdisk/grub_config.h"

namespace minivmm::bootdisk {

// One file of loader/entries. Nullopt: it names no kernel.
std::optional<BootEntry> parse_loader_entry(std::string_view text, const Variables& variables);

// The entries with a kernel, the default one first.
std::vector<BootEntry> parse_extlinux(std::string_view text);

}  // namespace minivmm::bootdisk
