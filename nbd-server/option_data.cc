// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/option_data.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd::wire {
namespace {

// Takes values from the front of an option's data.
class Reader {
 public:
  explicit Reader(std::span<const std::byte> data) noexcept : left_(data) {}

  template <typename T>
  T number(std::string_view what) {
    const auto bytes = take(sizeof(T), what);
    return base::load_be<T>(bytes.data());
  }
  std::string_view text(std::string_view what) {
    const auto length = number<uint32_t>(what);
    return check_string(take(length, what), what);
  }
  size_t left() const noexcept { return left_.size(); }
  void finish() const {
    if (!left_.empty()) throw base::Error(EINVAL, "the option's length exceeds its contents");
  }

 private:
  std::span<const std::byte> take(size_t n, std::string_view what) {
    if (left_.size() < n) {
      throw base::Error(EINVAL, fmt::format("the option's data end inside its {}", what));
    }
    const auto out = left_.first(n);
    left_ = left_.subspan(n);
    return out;
  }

  std::span<const std::byte> left_;
};

}  // namespace

std::string_view check_string(std::span<const std::byte> bytes, std::string_view what) {
  if (bytes.size() > kMaxString) {
    throw base::Error(EINVAL, fmt::format("{} is longer than {} bytes", what, kMaxString));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (text.find('\0') != text.npos) {
    throw base::Error(EINVAL, fmt::format("{} contains a NUL", what));
  }
  return text;
}

bool InfoRequest::wants(uint16_t info) const noexcept {
  return std::find(infos.begin(), infos.end(), info) != infos.end();
}

InfoRequest decode_info_request(std::span<const std::byte> data) {
  Reader reader(data);
  InfoRequest out;
  out.name = reader.text("export name");
  const auto count = reader.number<uint16_t>("number of information requests");
  // Checked before anything is made for them.
  if (reader.left() != size_t{count} * 2) {
    throw base::Error(EINVAL, "the number of information requests does not match the length");
  }
  out.infos.reserve(count);
  for (unsigned i = 0; i < count; ++i) {
    out.infos.push_back(reader.number<uint16_t>("information request"));
  }
  return out;
}

MetaContextRequest decode_meta_context_request(std::span<const std::byte> data) {
  Reader reader(data);
  MetaContextRequest out;
  out.name = reader.text("export name");
  const auto count = reader.number<uint32_t>("number of queries");
  if (count > reader.left() / 4) {
    throw base::Error(EINVAL, "the number of queries does not match the length");
  }
  out.queries.reserve(count);
  for (uint32_t i = 0; i < count; ++i) out.queries.push_back(reader.text("query"));
  reader.finish();
  return out;
}

}  // namespace minivmm::nbd::wire
