// SPDX-License-Identifier: Apache-2.0
// The data of handshake options. Pure: the views point into the bytes that were given. What a
// client got wrong throws base::Error(EINVAL) with a text for it.
#pragma once

#include <string_view>

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace minivmm::nbd::wire {

// A string of the protocol: at most kMaxString bytes, no NUL.
std::string_view check_string(std::span<const std::byte> bytes, std::string_view what);

// INFO and GO: name length:32, name, count:16, count times info type:16.
struct InfoRequest {
  std::string_view name;
  std::vector<uint16_t> infos;

  bool wants(uint16_t info) const noexcept;
};
InfoRequest decode_info_request(std::span<const std::byte> data);

// LIST_META_CONTEXT and SET_META_CONTEXT: name length:32, name, count:32, count times
// (length:32, query).
struct MetaContextRequest {
  std::string_view name;
  std::vector<std::string_view> queries;
};
MetaContextRequest decode_meta_context_request(std::span<const std::byte> data);

}  // namespace minivmm::nbd::wire
