// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/loader_entries.h"

#include <algorithm>
#include <cctype>

namespace minivmm::bootdisk {
namespace {

constexpr std::string_view kBlanks = " \t\r";

std::string_view trim(std::string_view text) {
  const size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

struct Line {
  std::string key;  // in lower case
  std::string_view value;
};

// Takes the next line that says something. Nullopt: the end.
std::optional<Line> take_line(std::string_view& text) {
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = trim(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.empty() || line.starts_with('#')) continue;
    const size_t blank = std::min(line.find_first_of(kBlanks), line.size());
    Line out{std::string(line.substr(0, blank)), trim(line.substr(blank))};
    std::transform(out.key.begin(), out.key.end(), out.key.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return out;
  }
  return std::nullopt;
}

void append_words(std::vector<std::string>& to, std::string_view text, char separator) {
  while (!text.empty()) {
    const size_t end = std::min(text.find(separator), text.size());
    if (const auto word = trim(text.substr(0, end)); !word.empty()) to.emplace_back(word);
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

void append_arguments(std::string& to, std::string_view more) {
  if (!to.empty() && !more.empty()) to += ' ';
  to += more;
}

// extlinux: initrds may stand in APPEND, and the kernel must not see them there.
void move_initrds(BootEntry& entry) {
  constexpr std::string_view kKey = "initrd=";
  std::vector<std::string> words;
  append_words(words, entry.arguments, ' ');
  entry.arguments.clear();
  for (const std::string& word : words) {
    if (word.starts_with(kKey)) {
      append_words(entry.initrds, std::string_view(word).substr(kKey.size()), ',');
    } else {
      append_arguments(entry.arguments, word);
    }
  }
}

}  // namespace

std::optional<BootEntry> parse_loader_entry(std::string_view text, const Variables& variables) {
  BootEntry entry;
  while (const auto line = take_line(text)) {
    const std::string value = expand(line->value, variables);
    if (line->key == "title") entry.title = value;
    if (line->key == "linux") entry.kernel = value;
    if (line->key == "initrd") append_words(entry.initrds, value, ' ');
    if (line->key == "options") append_arguments(entry.arguments, trim(value));
  }
  if (entry.kernel.empty()) return std::nullopt;
  return entry;
}

std::vector<BootEntry> parse_extlinux(std::string_view text) {
  std::vector<BootEntry> entries;
  std::string chosen;
  while (const auto line = take_line(text)) {
    if (line->key == "default") chosen = line->value;
    if (line->key == "label") {
      if (entries.size() == kMaxEntries) break;
      entries.push_back({std::string(line->value), {}, {}, {}});
    }
    if (entries.empty()) continue;
    BootEntry& entry = entries.back();
    if (line->key == "linux" || line->key == "kernel") entry.kernel = line->value;
    if (line->key == "initrd") append_words(entry.initrds, line->value, ',');
    if (line->key == "append") append_arguments(entry.arguments, line->value);
  }
  std::erase_if(entries, [](const BootEntry& entry) { return entry.kernel.empty(); });
  for (BootEntry& entry : entries) move_initrds(entry);
  std::stable_partition(entries.begin(), entries.end(),
                        [&](const BootEntry& entry) { return entry.title == chosen; });
  return entries;
}

}  // namespace minivmm::bootdisk
