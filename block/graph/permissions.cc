// SPDX-License-Identifier: Apache-2.0
#include "block/graph/permissions.h"

namespace minivmm::block {

std::string permission_words(uint8_t bits) {
  if ((bits & Permissions::kResizeInUse) != 0) bits |= Permissions::kResize;
  switch (bits & (Permissions::kWrite | Permissions::kResize)) {
    case Permissions::kWrite:
      return "write";
    case Permissions::kResize:
      return "resize";
    case Permissions::kWrite | Permissions::kResize:
      return "write and resize";
    default:
      return "read";
  }
}

}  // namespace minivmm::block
