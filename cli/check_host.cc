// SPDX-License-Identifier: Apache-2.0
// minivmm check-host
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "cli/command.h"
#include "cli/host_items.h"
#include "cli/image_arguments.h"

namespace minivmm::cli {

namespace po = boost::program_options;

namespace {

constexpr const char* kUsage =
    "Usage: minivmm check-host [--output=human|json]\n\n"
    "Shows what this machine offers for guests and exports, and what to do about what it lacks.\n"
    "Exit status: 0 if a guest can run with its disks served over NBD and FUSE, 1 if something\n"
    "needed for that is missing.\n\n"
    "Examples:\n"
    "  minivmm check-host\n"
    "  minivmm check-host --output=json | jq '.items[] | select(.state != \"ok\")'\n\n";

const char* state_name(HostState state) {
  switch (state) {
    case HostState::kOk:
      return "ok";
    case HostState::kLimited:
      return "limited";
    default:
      return "missing";
  }
}

// Terminal colours: green, yellow, red.
const char* state_colour(HostState state) {
  switch (state) {
    case HostState::kOk:
      return "\033[32m";
    case HostState::kLimited:
      return "\033[33m";
    default:
      return "\033[31m";
  }
}

bool use_colour() {
  const char* refused = std::getenv("NO_COLOR");
  return ::isatty(STDOUT_FILENO) == 1 && (refused == nullptr || *refused == '\0');
}

bool can_run(const std::vector<HostItem>& items) {
  return std::none_of(items.begin(), items.end(), [](const HostItem& item) {
    return item.needed && item.state == HostState::kMissing;
  });
}

void print_text(const std::vector<HostItem>& items) {
  const bool colour = use_colour();
  for (const HostItem& item : items) {
    fmt::print("{}{:<8}{} {:<17} {}\n", colour ? state_colour(item.state) : "",
               state_name(item.state), colour ? "\033[0m" : "", item.name, item.text);
    if (!item.advice.empty()) fmt::print("{:<26} -> {}\n", "", item.advice);
  }
  fmt::print("\n{}\n", can_run(items) ? "A guest can run here, its disks served over NBD and FUSE."
                                      : "Something that is needed is missing; what does not need "
                                        "it works.");
}

void print_json(const std::vector<HostItem>& items) {
  nlohmann::ordered_json out;
  out["can-run"] = can_run(items);
  out["items"] = nlohmann::ordered_json::array();
  for (const HostItem& item : items) {
    out["items"].push_back({{"name", item.name},
                            {"state", state_name(item.state)},
                            {"needed", item.needed},
                            {"text", item.text},
                            {"advice", item.advice}});
  }
  fmt::print("{}\n", out.dump(4, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

}  // namespace

int run_check_host(const std::vector<std::string>& arguments) {
  ImageSyntax syntax;
  syntax.usage = kUsage;
  add_options(syntax.options,
              {{"output", "human|json", "what the output is for: people (the default) or programs"},
               {"help,h", nullptr, "this text"}});
  po::variables_map values;
  if (!parse_image_arguments(arguments, syntax, values)) return 0;
  if (!given_names(values).empty()) throw UsageError{"check-host takes no file name"};
  const std::vector<HostItem> items = check_host();
  if (output_format(values) == OutputFormat::kJson) {
    print_json(items);
  } else {
    print_text(items);
  }
  return can_run(items) ? 0 : 1;
}

}  // namespace minivmm::cli
