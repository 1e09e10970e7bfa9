// SPDX-License-Identifier: Apache-2.0
// What `image convert` was asked to do: its options, read and checked against each other before
// anything is opened.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include <boost/program_options.hpp>

#include "cli/image_open.h"

namespace minivmm::cli {

struct ConvertRequest {
  std::vector<ImageName> sources;
  std::string target;  // a path, or options with `target_is_options`
  bool target_is_options = false;
  std::string target_format;
  std::vector<std::string> create_options;
  std::optional<std::string> backing;
  std::optional<std::string> backing_format;
  CacheMode source_cache;
  CacheMode target_cache;
  uint64_t zero_bytes = 4096;
  uint64_t rate = 0;
  unsigned requests = 0;  // 0: not given
  bool skip_create = false;
  bool target_is_zero = false;
  bool compress = false;
  bool copy_range = false;
  bool salvage = false;
  bool bitmaps = false;
  bool skip_broken_bitmaps = false;
  NodeOptions snapshot;
  bool force_share = false;
  bool progress = false;
  bool quiet = false;
};

// True if an -o has something that begins so ("compat=v2").
bool sets_option(const ConvertRequest& request, std::string_view beginning);

// Throws base::Error in qemu-img's words.
ConvertRequest read_convert_request(const boost::program_options::variables_map& values);

}  // namespace minivmm::cli
