// SPDX-License-Identifier: Apache-2.0
// What an NBD server says of itself and of its exports, for people and tools. Blocking: not on a
// fiber. A server that tells more than anybody would want to keep (16 MiB) is E2BIG.
#pragma once

#include <string>

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "base/nbd_uri.h"

namespace minivmm::block {

struct NbdExportSurvey {
  std::string name;
  std::string description;
  std::string uri;
  uint64_t size = 0;
  std::vector<std::string> contexts;
  // "is_read_only", "can_trim", ... in the order in which nbdinfo has them.
  std::vector<std::pair<const char*, bool>> abilities;
  // 0: not told.
  uint64_t minimum_block = 0;
  uint64_t preferred_block = 0;
  uint64_t maximum_block = 0;
};

struct NbdServerSurvey {
  std::string protocol;
  bool tls = false;
  bool structured = false;
  std::vector<NbdExportSurvey> exports;
};

// The export that the URI names, or, with `all`, every one that the server lists. Throws what the
// server or the system said.
NbdServerSurvey survey_nbd_server(const base::NbdUri& uri, bool all);

// Names and descriptions only.
std::vector<std::pair<std::string, std::string>> list_nbd_exports(const base::NbdUri& uri);

// What a metadata context says of the whole of an export, in order: adjacent parts of the same type
// are one. Throws ENOTSUP where the server does not offer the context.
struct NbdExtent {
  uint64_t offset = 0;
  uint64_t length = 0;
  uint32_t type = 0;
};
void map_nbd_export(const base::NbdUri& uri, const std::string& context,
                    const std::function<void(const NbdExtent&)>& take);

}  // namespace minivmm::block
