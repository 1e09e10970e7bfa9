// SPDX-License-Identifier: Apache-2.0
#include "cli/image_map_output.h"

#include <algorithm>
#include <cerrno>
#include <cmath>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/image_arguments.h"
#include "cli/image_info_output.h"

namespace minivmm::cli {

bool merge(MapEntry& entry, const MapEntry& next) {
  if (entry.start + entry.length != next.start || entry.depth != next.depth ||
      entry.present != next.present || entry.zero != next.zero || entry.data != next.data ||
      entry.compressed != next.compressed || entry.unknown != next.unknown ||
      entry.offset.has_value() != next.offset.has_value() || entry.file != next.file) {
    return false;
  }
  if (entry.offset && *entry.offset + entry.length != *next.offset) return false;
  entry.length += next.length;
  return true;
}

std::string map_header() {
  return fmt::format("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
}

namespace {

// As C's %#llx: no prefix for 0.
std::string hex(uint64_t value) { return value == 0 ? "0" : fmt::format("{:#x}", value); }

const char* word(bool value) { return value ? "true" : "false"; }

}  // namespace

std::string map_line(const MapEntry& entry) {
  if (!entry.data) return {};
  if (!entry.offset) {
    throw base::Error(ENOTSUP, "File contains external, encrypted or compressed clusters.");
  }
  if (entry.zero) return {};
  return fmt::format("{:<16}{:<16}{:<16}{}\n", hex(entry.start), hex(entry.length),
                     hex(*entry.offset), printable(entry.file));
}

std::string map_json(const MapEntry& entry) {
  std::string out = fmt::format(
      "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, "
      "\"data\": {}",
      entry.start, entry.length, entry.depth, word(entry.present), word(entry.zero),
      word(entry.data));
  if (entry.offset) out += fmt::format(", \"offset\": {}", *entry.offset);
  return out + "}";
}

namespace {

constexpr unsigned kWidth = 1000;
constexpr unsigned kRow = 56;
constexpr unsigned kBar = 28;
constexpr unsigned kMargin = 20;

// What differs in colour. In the order in which they cover each other in a pixel.
struct Kind {
  const char* name;
  const char* colour;
};
constexpr Kind kKinds[] = {{"not in this layer", "#f2f2f2"},
                           {"zero", "#b9d7ea"},
                           {"in a backing file that was not opened", "#d9c2e9"},
                           {"data", "#2a6f97"},
                           {"compressed data", "#e07a3f"}};

size_t kind_of(const MapEntry& entry) {
  if (entry.compressed && entry.data) return 4;
  if (entry.data) return 3;
  if (entry.unknown) return 2;
  return entry.present ? 1 : 0;
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : printable(text)) {
    switch (c) {
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '&':
        out += "&amp;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out.push_back(c);
    }
  }
  return out;
}

// Of each pixel of a layer's bar, its kind: of those that share it the most telling one. The
// picture is as small for a fragmented disk as for another.
std::vector<uint8_t> pixels_of(const std::vector<MapEntry>& entries, size_t layer, uint64_t size) {
  std::vector<uint8_t> pixels(kWidth, 0);
  const double scale =
      static_cast<double>(kWidth) / static_cast<double>(std::max<uint64_t>(size, 1));
  for (const MapEntry& entry : entries) {
    if (entry.depth != layer) continue;
    const auto first = static_cast<size_t>(static_cast<double>(entry.start) * scale);
    const auto end = static_cast<double>(entry.start + entry.length) * scale;
    const auto last =
        std::min<size_t>(kWidth, std::max(first + 1, static_cast<size_t>(std::lround(end))));
    for (size_t x = first; x < last; ++x) {
      pixels[x] = std::max(pixels[x], static_cast<uint8_t>(kind_of(entry)));
    }
  }
  return pixels;
}

std::string layer_svg(const std::vector<MapEntry>& entries, const std::string& name, size_t layer,
                      uint64_t size, unsigned y) {
  uint64_t held = 0;
  for (const MapEntry& entry : entries) {
    if (entry.depth == layer && entry.data) held += entry.length;
  }
  std::string out = fmt::format("<text x=\"{}\" y=\"{}\">{}: {} of data seen through it</text>\n",
                                kMargin, y + 14, escaped(name), size_text(held));
  const std::vector<uint8_t> pixels = pixels_of(entries, layer, size);
  for (size_t x = 0; x < pixels.size();) {
    size_t end = x;
    while (end < pixels.size() && pixels[end] == pixels[x]) ++end;
    out += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{}\"/>\n",
                       kMargin + x, y + 20, end - x, kBar, kKinds[pixels[x]].colour);
    x = end;
  }
  return out;
}

std::string legend_svg(unsigned y) {
  std::string out;
  unsigned x = kMargin;
  for (const Kind& kind : kKinds) {
    out += fmt::format(
        "<rect x=\"{}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{}\" stroke=\"#888\"/>"
        "<text x=\"{}\" y=\"{}\">{}</text>\n",
        x, y, kind.colour, x + 18, y + 11, kind.name);
    x += 40 + static_cast<unsigned>(std::char_traits<char>::length(kind.name)) * 7;
  }
  return out;
}

}  // namespace

std::string map_svg(const std::vector<MapEntry>& entries, const std::vector<std::string>& layers,
                    uint64_t size) {
  const auto rows = static_cast<unsigned>(layers.size());
  const unsigned height = kMargin + rows * kRow + 60;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
      kWidth + 2 * kMargin, height);
  unsigned y = kMargin;
  for (size_t layer = 0; layer < layers.size(); ++layer, y += kRow) {
    out += layer_svg(entries, layers[layer], layer, size, y);
  }
  out += fmt::format("<text x=\"{}\" y=\"{}\">0</text>\n", kMargin, y + 8);
  out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n", kMargin + kWidth,
                     y + 8, size_text(size));
  return out + legend_svg(y + 24) + "</svg>\n";
}

}  // namespace minivmm::cli
