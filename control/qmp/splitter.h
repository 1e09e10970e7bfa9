// SPDX-License-Identifier: Apache-2.0
// Cuts the bytes of a control client into JSON texts. A message ends with the brace that closes it:
// lines mean nothing. What cannot be a message is told once, and the next one is looked for behind
// the end of the line or behind a byte 0xFF, which no text has (clients send it to begin anew).
//
// One a client; no I/O. Holds at most one message of kMostBytes and what was fed and not yet taken.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <optional>

namespace minivmm::control::qmp {

inline constexpr size_t kMostBytes = size_t{256} << 10;
inline constexpr size_t kMostDepth = 64;

class MessageSplitter {
 public:
  struct Piece {
    std::string text;     // a message, if there is no problem
    std::string problem;  // what to tell the client instead
  };

  void feed(std::string_view bytes) { waiting_.append(bytes); }
  // The next message or problem; nothing: more bytes are needed.
  std::optional<Piece> next();

 private:
  enum class Where { kBetween, kInside, kGarbage };
  std::optional<Piece> between(char c);
  std::optional<Piece> inside(char c);
  Piece end_message();
  void begin_anew(Where where);

  std::string waiting_;
  Where where_ = Where::kBetween;
  std::string message_;
  size_t bytes_ = 0;  // of the message, also of one that is too large to be kept
  size_t depth_ = 0;
  size_t deepest_ = 0;
  bool in_string_ = false;
  bool escaped_ = false;
};

}  // namespace minivmm::control::qmp
