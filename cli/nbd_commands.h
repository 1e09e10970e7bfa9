// SPDX-License-Identifier: Apache-2.0
// The subcommands of `minivmm nbd`, in a table, as those of image.
#pragma once

#include <string>

#include <span>

#include "base/nbd_uri.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"

namespace minivmm::cli {

std::span<const ImageCommand> nbd_commands();

// What --help says before the options, and these; --help itself is added.
ImageSyntax nbd_syntax(const char* usage, std::initializer_list<ImageOption> options);

// The same for commands that talk to a server: with the options of nbd_server().
ImageSyntax nbd_server_syntax(const char* usage, std::initializer_list<ImageOption> options);

// A URI, or HOST[:PORT] as nbd-client has it; with TLS where the options say so. Throws.
base::NbdUri nbd_server(const boost::program_options::variables_map& values,
                        const std::string& text);

ImageSyntax nbd_connect_syntax();
int run_nbd_connect(const boost::program_options::variables_map& values);
ImageSyntax nbd_disconnect_syntax();
int run_nbd_disconnect(const boost::program_options::variables_map& values);
ImageSyntax nbd_info_syntax();
int run_nbd_info(const boost::program_options::variables_map& values);
ImageSyntax nbd_list_syntax();
int run_nbd_list(const boost::program_options::variables_map& values);

}  // namespace minivmm::cli
