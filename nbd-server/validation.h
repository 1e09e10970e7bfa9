// SPDX-License-Identifier: Apache-2.0
// Whether a request may be run at all: decided from its header alone, before anything is spent on
// it. Pure.
#pragma once

#include <cstdint>
#include <optional>

#include "nbd-server/wire.h"

namespace minivmm::nbd {

// What the client and the export have agreed on, as far as requests depend on it.
struct RequestRules {
  uint64_t size = 0;
  bool writable = false;
  wire::Headers headers = wire::Headers::kSimple;
  bool contexts = false;  // at least one metadata context was selected
};

struct Refusal {
  wire::ErrorCode error;
  const char* reason;  // a literal, for the client's user
};

std::optional<Refusal> refuse(const wire::Request& request, const RequestRules& rules) noexcept;

}  // namespace minivmm::nbd
