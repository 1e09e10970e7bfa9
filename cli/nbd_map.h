// SPDX-License-Identifier: Apache-2.0
// minivmm nbd info --map: what a metadata context says of an export, as nbdinfo prints it.
#pragma once

#include <string>

#include "base/nbd_uri.h"

namespace minivmm::cli {

// Throws.
void print_nbd_map(const base::NbdUri& uri, const std::string& context, bool totals, bool json);

}  // namespace minivmm::cli
