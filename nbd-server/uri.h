// SPDX-License-Identifier: Apache-2.0
// NBD URIs under the names of this folder.
#pragma once

#include "base/nbd_uri.h"

namespace minivmm::nbd {

using Uri = base::NbdUri;
inline Uri parse_uri(std::string_view text) { return base::parse_nbd_uri(text); }

}  // namespace minivmm::nbd
