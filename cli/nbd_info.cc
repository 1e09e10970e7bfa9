// SPDX-License-Identifier: Apache-2.0
// minivmm nbd info and list: nbdinfo's output, and nbd-client's list of names.
#include <string>

#include <algorithm>
#include <vector>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "block/protocols/nbd/survey.h"
#include "cli/command.h"
#include "cli/nbd_commands.h"
#include "cli/nbd_map.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using block::NbdExportSurvey;
using block::NbdServerSurvey;
using Json = nlohmann::ordered_json;

namespace {

std::string one_server(const po::variables_map& values) {
  const auto names = given_names(values);
  if (names.size() != 1) throw UsageError{"one server is expected: a URI, or HOST[:PORT]"};
  return names.front();
}

// "10M": the largest unit that leaves no rest, as nbdinfo has it.
std::string size_text(uint64_t size) {
  constexpr const char* kUnits[] = {"", "K", "M", "G", "T", "P", "E"};
  size_t unit = 0;
  while (size != 0 && size % 1024 == 0 && unit + 1 < std::size(kUnits)) {
    size /= 1024;
    ++unit;
  }
  return fmt::format("{}{}", size, kUnits[unit]);
}

std::vector<std::pair<const char*, uint64_t>> block_sizes(const NbdExportSurvey& e) {
  std::vector<std::pair<const char*, uint64_t>> out;
  if (e.minimum_block != 0) out.emplace_back("block_size_minimum", e.minimum_block);
  if (e.preferred_block != 0) out.emplace_back("block_size_preferred", e.preferred_block);
  if (e.maximum_block != 0) out.emplace_back("block_size_maximum", e.maximum_block);
  return out;
}

Json json_of(const NbdExportSurvey& e) {
  Json out;
  out["export-name"] = e.name;
  if (!e.description.empty()) out["description"] = e.description;
  out["uri"] = e.uri;
  if (!e.contexts.empty()) out["contexts"] = e.contexts;
  for (const auto& [name, value] : e.abilities) out[name] = value;
  for (const auto& [name, value] : block_sizes(e)) out[name] = value;
  out["export-size"] = e.size;
  out["export-size-str"] = size_text(e.size);
  return out;
}

// Text that is not UTF-8 is a server's, and replaced rather than refused.
void print_json(const NbdServerSurvey& server) {
  Json out;
  out["protocol"] = server.protocol;
  out["TLS"] = server.tls;
  out["structured"] = server.structured;
  out["exports"] = Json::array();
  for (const NbdExportSurvey& each : server.exports) out["exports"].push_back(json_of(each));
  fmt::print("{}\n", out.dump(2, ' ', false, Json::error_handler_t::replace));
}

void print_human(const NbdServerSurvey& server) {
  fmt::print("protocol: {} {} TLS, using {} packets\n", server.protocol,
             server.tls ? "with" : "without", server.structured ? "structured" : "simple");
  for (const NbdExportSurvey& e : server.exports) {
    fmt::print("export=\"{}\":\n", printable(e.name));
    if (!e.description.empty()) fmt::print("\tdescription: {}\n", printable(e.description));
    const std::string size = size_text(e.size);
    const bool plain = size == std::to_string(e.size);
    fmt::print("\texport-size: {}{}\n", e.size, plain ? "" : fmt::format(" ({})", size));
    fmt::print("\turi: {}\n", e.uri);
    if (!e.contexts.empty()) fmt::print("\tcontexts:\n");
    for (const std::string& context : e.contexts) fmt::print("\t\t{}\n", printable(context));
    for (const auto& [name, value] : e.abilities) fmt::print("\t{}: {}\n", name, value);
    for (const auto& [name, value] : block_sizes(e)) fmt::print("\t{}: {}\n", name, value);
  }
}

// As nbdinfo's --can and --is ask.
bool is_so(const NbdServerSurvey& server, const std::string& what) {
  if (what == "connect" || what == "read") return true;
  if (what == "tls") return server.tls;
  const NbdExportSurvey& e = server.exports.at(0);
  const bool negated = what == "write";
  std::string name = negated ? "read_only" : what;
  std::replace(name.begin(), name.end(), '-', '_');
  for (const auto& [ability, value] : e.abilities) {
    const std::string_view full = ability;
    if (full == "can_" + name || full == "is_" + name) return value != negated;
  }
  throw UsageError{fmt::format("unknown --can or --is option: {}", what)};
}

void print_survey(const po::variables_map& values, const NbdServerSurvey& server) {
  if (is_set(values, "json")) {
    print_json(server);
  } else {
    print_human(server);
  }
}

}  // namespace

ImageSyntax nbd_info_syntax() {
  return nbd_server_syntax(
      "Usage: minivmm nbd info [--json] [--size|--map [--totals]|--can WHAT|--is WHAT] "
      "URI|HOST[:PORT]\n\n"
      "Shows what an NBD server says of an export, as nbdinfo does: its size, what clients may "
      "do,\n"
      "block sizes, metadata contexts. Without a name it is the server's default export.\n\n"
      "Examples:\n"
      "  minivmm nbd info nbd://server/disk0\n"
      "  minivmm nbd info --json 'nbd+unix:///disk0?socket=m.sock' | jq "
      "'.exports[0].\"is_read_only\"'\n\n",
      {
          {"json", nullptr, "for programs, with nbdinfo's names"},
          {"size", nullptr, "only the size, in bytes"},
          {"map", nullptr, "where there are data, holes and zeroes"},
          {"context", "NAME", "with --map: what this metadata context says instead"},
          {"totals", nullptr, "with --map: how much of each kind there is"},
          {"can", "WHAT",
           "exit status 0 or 2: read, write, cache, df, fast-zero, flush, fua, multi-conn, trim, "
           "zero, connect"},
          {"is", "WHAT", "the same: read-only, rotational, tls"},
      });
}

int run_nbd_info(const po::variables_map& values) {
  const base::NbdUri uri = nbd_server(values, one_server(values));
  const bool map = is_set(values, "map");
  if (!map && (is_set(values, "totals") || values.count("context") != 0)) {
    throw UsageError{"--totals and --context go with --map"};
  }
  if (map) {
    print_nbd_map(uri, optional_text(values, "context").value_or("base:allocation"),
                  is_set(values, "totals"), is_set(values, "json"));
    return 0;
  }
  const NbdServerSurvey server = block::survey_nbd_server(uri, /*all=*/false);
  for (const char* const option : {"can", "is"}) {
    if (const auto what = optional_text(values, option)) return is_so(server, *what) ? 0 : 2;
  }
  if (is_set(values, "size")) {
    fmt::print("{}\n", server.exports.at(0).size);
  } else {
    print_survey(values, server);
  }
  return 0;
}

ImageSyntax nbd_list_syntax() {
  return nbd_server_syntax(
      "Usage: minivmm nbd list [--long] [--json] URI|HOST[:PORT]\n\n"
      "Lists the exports of an NBD server: a name and its description a line, as nbd-client -l "
      "does.\n\n"
      "Examples:\n"
      "  minivmm nbd list server\n"
      "  minivmm nbd list --long 'nbd+unix:///?socket=m.sock'\n\n",
      {
          {"long,l", nullptr, "all that `minivmm nbd info` shows, of each of them"},
          {"json", nullptr, "the same for programs"},
      });
}

int run_nbd_list(const po::variables_map& values) {
  const base::NbdUri uri = nbd_server(values, one_server(values));
  if (is_set(values, "json") || is_set(values, "long")) {
    print_survey(values, block::survey_nbd_server(uri, /*all=*/true));
    return 0;
  }
  for (const auto& [name, description] : block::list_nbd_exports(uri)) {
    fmt::print("{}{}{}\n", printable(name), description.empty() ? "" : ": ",
               printable(description));
  }
  return 0;
}

}  // namespace minivmm::cli
