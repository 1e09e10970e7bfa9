// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_map.h"

#include <cerrno>
#include <cstdio>
#include <map>

#include <fmt/core.h>

#include "base/error.h"
#include "block/protocols/nbd/survey.h"

namespace minivmm::cli {

using block::NbdExtent;

namespace {

// Empty for contexts that nobody knows.
std::string describe(const std::string& context, uint32_t type) {
  if (context == "base:allocation") {
    constexpr const char* kStates[] = {"data", "hole", "zero", "hole,zero"};
    return type < std::size(kStates) ? kStates[type] : "";
  }
  if (context.starts_with("qemu:dirty-bitmap:")) {
    constexpr const char* kStates[] = {"clean", "dirty"};
    return type < std::size(kStates) ? kStates[type] : "";
  }
  if (context != "qemu:allocation-depth") return {};
  if (type == 0) return "absent";
  return type == 1 ? "local" : fmt::format("backing depth {}", type);
}

std::string json_description(const std::string& text) {
  return text.empty() ? "" : fmt::format(", \"description\": \"{}\"", text);
}

void print_extents(const base::NbdUri& uri, const std::string& context, bool json) {
  bool first = true;
  block::map_nbd_export(uri, context, [&](const NbdExtent& e) {
    const std::string text = describe(context, e.type);
    if (!json) {
      fmt::print("{:>10}  {:>10}  {:>3}{}{}\n", e.offset, e.length, e.type,
                 text.empty() ? "" : "  ", text);
      return;
    }
    fmt::print("{}{{ \"offset\": {}, \"length\": {}, \"type\": {}{}}}", first ? "[\n" : ",\n",
               e.offset, e.length, e.type, json_description(text));
    first = false;
  });
  // After the map: until then it can turn out that there is none.
  if (json) fmt::print("{}\n]\n", first ? "[\n" : "");
}

// A server may make up another kind for each byte.
constexpr size_t kMostKinds = 100'000;

void print_totals(const base::NbdUri& uri, const std::string& context, bool json) {
  std::map<uint32_t, uint64_t> totals;
  uint64_t size = 0;
  block::map_nbd_export(uri, context, [&](const NbdExtent& e) {
    totals[e.type] += e.length;
    if (totals.size() > kMostKinds) {
      throw base::Error(E2BIG, fmt::format("{}: the server tells of more than {} kinds of extents",
                                           uri.text(), kMostKinds));
    }
    size += e.length;
  });
  const char* before = "[\n";
  for (const auto& [type, bytes] : totals) {
    const double percent = 100.0 * static_cast<double>(bytes) / static_cast<double>(size);
    const std::string text = describe(context, type);
    if (json) {
      fmt::print("{}{{ \"size\": {}, \"percent\": {:g}, \"type\": {}{} }}", before, bytes, percent,
                 type, json_description(text));
      before = ",\n";
    } else {
      fmt::print("{:>10} {:5.1f}% {:>3}{}{}\n", bytes, percent, type, text.empty() ? "" : " ",
                 text);
    }
  }
  if (json) fmt::print("{}\n]\n", totals.empty() ? "[\n" : "");
}

}  // namespace

void print_nbd_map(const base::NbdUri& uri, const std::string& context, bool totals, bool json) {
  if (totals) {
    print_totals(uri, context, json);
  } else {
    print_extents(uri, context, json);
  }
}

}  // namespace minivmm::cli
