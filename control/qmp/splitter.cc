// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/splitter.h"

#include <algorithm>

#include <fmt/core.h>

namespace minivmm::control::qmp {
namespace {

constexpr char kReset = '\xff';
constexpr const char* kNoJson = "Invalid JSON syntax";

bool is_space(char c) noexcept { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

}  // namespace

void MessageSplitter::begin_anew(Where where) {
  where_ = where;
  message_.clear();
  bytes_ = depth_ = deepest_ = 0;
  in_string_ = escaped_ = false;
}

std::optional<MessageSplitter::Piece> MessageSplitter::next() {
  size_t at = 0;
  std::optional<Piece> out;
  while (at < waiting_.size() && !out) {
    const char c = waiting_[at++];
    switch (where_) {
      case Where::kBetween:
        out = between(c);
        break;
      case Where::kInside:
        out = inside(c);
        break;
      case Where::kGarbage:
        if (c == '\n' || c == kReset) begin_anew(Where::kBetween);
        break;
    }
  }
  waiting_.erase(0, at);
  return out;
}

std::optional<MessageSplitter::Piece> MessageSplitter::between(char c) {
  if (is_space(c) || c == kReset) return std::nullopt;
  if (c == '{' || c == '[') {
    begin_anew(Where::kInside);
    return inside(c);
  }
  begin_anew(Where::kGarbage);
  return Piece{{}, kNoJson};
}

std::optional<MessageSplitter::Piece> MessageSplitter::inside(char c) {
  if (c == kReset || (in_string_ && static_cast<unsigned char>(c) < ' ')) {
    begin_anew(Where::kBetween);
    return Piece{{}, kNoJson};
  }
  if (++bytes_ <= kMostBytes) message_ += c;
  if (in_string_) {
    if (escaped_) {
      escaped_ = false;
    } else if (c == '\\') {
      escaped_ = true;
    } else if (c == '"') {
      in_string_ = false;
    }
    return std::nullopt;
  }
  if (c == '"') {
    in_string_ = true;
  } else if (c == '{' || c == '[') {
    deepest_ = std::max(deepest_, ++depth_);
  } else if (c == '}' || c == ']') {
    if (--depth_ == 0) return end_message();
  }
  return std::nullopt;
}

MessageSplitter::Piece MessageSplitter::end_message() {
  Piece out;
  if (bytes_ > kMostBytes) {
    out.problem =
        fmt::format("The message has {} bytes, and may have at most {}", bytes_, kMostBytes);
  } else if (deepest_ > kMostDepth) {
    out.problem =
        fmt::format("The message is nested {} deep, and may be at most {}", deepest_, kMostDepth);
  } else {
    out.text = std::move(message_);
  }
  begin_anew(Where::kBetween);
  return out;
}

}  // namespace minivmm::control::qmp
