// SPDX-License-Identifier: Apache-2.0
// The output of `image info`, as qemu-img writes it. Pure.
#pragma once

#include <string>

#include <cstdint>
#include <vector>

#include "cli/image_facts.h"

namespace minivmm::cli {

// "image: disk.qcow2\nfile format: qcow2\n...".
std::string info_text(const ImageFacts& facts);
// A JSON object, and a list of them.
std::string info_json(const ImageFacts& facts);
std::string info_json(const std::vector<ImageFacts>& chain);

// "Snapshot list:\nID ...": nothing where there are none.
std::string snapshots_text(const ImageFacts& facts);

// "1.5 GiB": three digits, in the unit that leaves less than 1000.
std::string size_text(uint64_t bytes);

}  // namespace minivmm::cli
