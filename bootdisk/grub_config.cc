// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/grub_config.h"

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <utility>

namespace minivmm::bootdisk {
namespace {

bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// Appends the value of the variable whose name begins at `at`, behind the dollar; moves `at` behind
// the name.
void take_variable(std::string_view text, size_t& at, const Variables& variables, std::string& to) {
  const bool braces = at < text.size() && text[at] == '{';
  if (braces) ++at;
  const size_t begin = at;
  while (at < text.size() && is_name(text[at])) ++at;
  const auto found = variables.find(text.substr(begin, at - begin));
  if (found != variables.end()) to += found->second;
  if (braces && at < text.size() && text[at] == '}') ++at;
}

// Cuts text into statements and those into words (GRUB manual, "Quoting").
class Lexer {
 public:
  Lexer(std::string_view text, const Variables& variables) : text_(text), variables_(variables) {}

  // The words of the next statement; an empty list for an empty one. False: the end.
  bool next(std::vector<std::string>& words) {
    words.clear();
    if (at_ >= text_.size()) return false;
    for (std::string word; at_ < text_.size(); word.clear()) {
      skip_blanks();
      if (at_ >= text_.size()) break;
      const char c = text_[at_];
      if (c == '\n' || c == ';') {
        ++at_;
        break;
      }
      if (c == '#') {
        at_ = std::min(text_.find('\n', at_), text_.size());
        continue;
      }
      if (c == '{' || c == '}') {
        ++at_;
        if (words.empty() && c == '}') continue;
        break;  // a block begins or ends: what follows is a statement of its own
      }
      take_word(word, words);
      if (!word.empty()) words.push_back(word);  // empty: a variable that is not set
    }
    return true;
  }

 private:
  void skip_blanks() {
    while (at_ < text_.size()) {
      if (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\r') {
        ++at_;
      } else if (text_.substr(at_, 2) == "\\\n") {
        at_ += 2;
      } else {
        return;
      }
    }
  }

  void take_word(std::string& word, std::vector<std::string>& words) {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (std::string_view(" \t\r\n;").find(c) != std::string_view::npos) return;
      if ((c == '{' || c == '}') && word.empty()) return;
      ++at_;
      if (c == '\'') {
        const size_t end = std::min(text_.find('\'', at_), text_.size());
        word += text_.substr(at_, end - at_);
        at_ = std::min(end + 1, text_.size());
      } else if (c == '"') {
        take_double_quoted(word);
      } else if (c == '\\' && at_ < text_.size()) {
        word += text_[at_++];
      } else if (c == '$') {
        take_words(word, words);
      } else {
        word += c;
      }
    }
  }

  void take_double_quoted(std::string& word) {
    while (at_ < text_.size() && text_[at_] != '"') {
      const char c = text_[at_++];
      if (c == '\\' && at_ < text_.size() &&
          std::string_view("\"$\\").find(text_[at_]) != std::string_view::npos) {
        word += text_[at_++];
      } else if (c == '$') {
        take_variable(text_, at_, variables_, word);
      } else {
        word += c;
      }
    }
    if (at_ < text_.size()) ++at_;
  }

  // Unquoted: the value's blanks part words.
  void take_words(std::string& word, std::vector<std::string>& words) {
    std::string value;
    take_variable(text_, at_, variables_, value);
    for (const char c : value) {
      if (c != ' ' && c != '\t') {
        word += c;
      } else if (!word.empty()) {
        words.push_back(std::exchange(word, {}));
      }
    }
  }

  std::string_view text_;
  const Variables& variables_;
  size_t at_ = 0;
};

// As a kernel's command line needs it: a word with blanks in quotes.
void append_argument(std::string& to, const std::string& word) {
  if (!to.empty()) to += ' ';
  const bool blanks = word.find_first_of(" \t") != std::string::npos;
  const size_t equals = word.find('=');
  if (!blanks || word.find('"') != std::string::npos) {
    to += word;
  } else if (equals == std::string::npos) {
    to += '"' + word + '"';
  } else {
    to += word.substr(0, equals + 1) + '"' + word.substr(equals + 1) + '"';
  }
}

bool is_any(std::string_view word, std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names) {
    if (word == name) return true;
  }
  return false;
}

}  // namespace

std::vector<BootEntry> parse_grub_config(std::string_view text, const Variables& variables) {
  std::vector<BootEntry> entries;
  std::vector<std::string> words;
  bool inside = false;
  const auto drop_empty = [&] {
    if (inside && entries.back().kernel.empty()) entries.pop_back();
  };
  Lexer lexer(text, variables);
  while (lexer.next(words)) {
    if (words.empty()) continue;
    if (words[0] == "menuentry" || words[0] == "submenu") {
      drop_empty();
      inside = words[0] == "menuentry" && entries.size() < kMaxEntries;
      if (inside) entries.push_back({words.size() > 1 ? words[1] : "", {}, {}, {}});
    } else if (inside && words.size() > 1 && is_any(words[0], {"linux", "linux16", "linuxefi"})) {
      BootEntry& entry = entries.back();
      entry.kernel = words[1];
      for (size_t i = 2; i < words.size(); ++i) append_argument(entry.arguments, words[i]);
    } else if (inside && is_any(words[0], {"initrd", "initrd16", "initrdefi"})) {
      entries.back().initrds.assign(words.begin() + 1, words.end());
    }
  }
  drop_empty();
  return entries;
}

Variables parse_grub_environment(std::string_view text) {
  Variables out;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    const size_t equals = line.find('=');
    if (line.starts_with('#') || equals == std::string_view::npos) continue;
    out.insert_or_assign(std::string(line.substr(0, equals)), std::string(line.substr(equals + 1)));
  }
  return out;
}

std::string expand(std::string_view text, const Variables& variables) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    if (text[at] != '$') {
      out += text[at++];
      continue;
    }
    ++at;
    take_variable(text, at, variables, out);
  }
  return out;
}

}  // namespace minivmm::bootdisk
