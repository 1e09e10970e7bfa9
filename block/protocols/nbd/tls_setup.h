// SPDX-License-Identifier: Apache-2.0
// How a connection of libnbd's does TLS.
#pragma once

#include "base/nbd_uri.h"
#include "block/protocols/nbd/libnbd.h"

namespace minivmm::block {

// Before the handle connects. False: libnbd says why. Throws ENOTSUP where this libnbd would not
// check what it is meant to check.
bool set_up_tls(const Libnbd& nbd, nbd_handle* handle, const base::NbdUri& uri);

}  // namespace minivmm::block
