// SPDX-License-Identifier: Apache-2.0
// minivmm nbd: finds the subcommand.
#include <cstdio>

#include <fmt/core.h>

#include "block/crypto/tls_object.h"
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

ImageSyntax nbd_server_syntax(const char* usage, std::initializer_list<ImageOption> options) {
  ImageSyntax out;
  out.usage = usage;
  add_options(out.options, options);
  add_options(
      out.options,
      {{"object", "TYPE,id=ID,...",
        "tls-creds-x509 or tls-creds-psk, with endpoint=client,dir=DIR: how we prove who "
        "we are, and whom we believe. A URI can say the same: "
        "nbds://HOST/EXPORT?tls-certificates=DIR or tls-psk-file=PATH"},
       {"tls-creds", "ID", "talk TLS, with this object"},
       {"tls-hostname", "NAME", "whom the server's certificate has to be for; HOST if not said"},
       {"help,h", nullptr, "this text"}});
  return out;
}

base::NbdUri nbd_server(const boost::program_options::variables_map& values,
                        const std::string& text) {
  base::NbdUri out = base::parse_nbd_uri(base::is_nbd_uri(text) ? text : "nbd://" + text);
  if (const auto id = optional_text(values, "tls-creds")) {
    const auto& objects = block::crypto::tls_objects();
    block::crypto::use_tls_object(objects.get(*id, /*server=*/false), out);
  }
  if (const auto name = optional_text(values, "tls-hostname")) {
    if (!out.tls) throw UsageError{"--tls-hostname goes with TLS: nbds in the URI, or --tls-creds"};
    out.tls_hostname = *name;
  }
  return out;
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
