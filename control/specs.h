// SPDX-License-Identifier: Apache-2.0
// The short forms that users type, turned into configuration. Each throws base::Error(EINVAL) that
// names the option and what it may be.
#pragma once

#include <string>
#include <string_view>

#include <optional>
#include <utility>
#include <vector>

#include "control/config.h"

namespace minivmm::control {

// "PATH[,key=value...]", or a JSON or dotted description with a `driver`. Reads the file's first
// bytes where no format is given. Blocking.
Disk parse_disk(std::string_view text, unsigned number);

// `--pin THREAD=CPUS`, such as vcpu0=2 or io0=0-1,4: a thread's name and processors.
std::pair<std::string, std::vector<unsigned>> parse_pin(std::string_view text);

Export parse_export(std::string_view text);
FuseMount parse_fuse(std::string_view text);
NbdListener parse_nbd(std::string_view text);
// Of the options clone=, clone-limit=, clone-total= and clone-dir= of an export, which it takes.
std::optional<CloneOptions> take_clone(block::Options& given, const std::string& export_name);
// Those that --object made under this id. Throws ENOENT, EINVAL.
nbd::TlsOptions tls_options(const std::string& id, bool optional);

// A node's options for an image file: what `--disk` and the image tool expand a plain path into.
// `format` empty: guessed from the file's first bytes, and `*guessed` says so.
block::Options image_options(const std::string& path, const std::string& format, bool read_only,
                             bool* guessed);

// The format that the file's first bytes look like. Throws if it cannot be read.
std::string probe_file(const std::string& path);

}  // namespace minivmm::control
