// SPDX-License-Identifier: Apache-2.0
// minivmm nbd: finds the subcommand.
#include <cstdio>

#include <fmt/core.h>

#include "cli/command.h"
#include "cli/nbd_commands.h"

namespace minivmm::cli {
namespace {

constexpr ImageCommand kNbdCommands[] = {
    {"connect", "make an export a block device of this machine", &nbd_connect_syntax,
     &run_nbd_connect},
    {"disconnect", "end such a device", &nbd_disconnect_syntax, &run_nbd_disconnect},
    {"info", "what a server says of an export", &nbd_info_syntax, &run_nbd_info},
    {"list", "the exports of a server", &nbd_list_syntax, &run_nbd_list},
};

void print_help(std::FILE* to) {
  fmt::print(to,
             "Looks at NBD servers, and uses their exports as block devices.\n\n"
             "Usage: minivmm nbd COMMAND [options]\n\nCommands:\n");
  for (const ImageCommand& command : kNbdCommands) {
    fmt::print(to, "  {:<10} {}\n", command.name, command.summary);
  }
  fmt::print(to,
             "\n`minivmm nbd COMMAND --help` teaches each one. A server: a URI "
             "(nbd://HOST[:PORT]/EXPORT,\nnbd+unix:///EXPORT?socket=PATH), or HOST[:PORT].\n");
}

}  // namespace

std::span<const ImageCommand> nbd_commands() { return kNbdCommands; }

ImageSyntax nbd_syntax(const char* usage, std::initializer_list<ImageOption> options) {
  ImageSyntax out;
  out.usage = usage;
  add_options(out.options, options);
  add_options(out.options, {{"help,h", nullptr, "this text"}});
  return out;
}

base::NbdUri nbd_address(const std::string& text) {
  return base::parse_nbd_uri(base::is_nbd_uri(text) ? text : "nbd://" + text);
}

int run_nbd(const std::vector<std::string>& arguments) {
  if (arguments.empty()) {
    print_help(stderr);
    return 1;
  }
  const std::string& first = arguments[0];
  if (first == "--help" || first == "-h" || first == "help") {
    print_help(stdout);
    return 0;
  }
  if (const auto status = run_from_table(kNbdCommands, arguments)) return *status;
  throw UsageError{fmt::format("unknown command 'nbd {}'", first)};
}

}  // namespace minivmm::cli
