// SPDX-License-Identifier: Apache-2.0
// The file behind an image as the user names it, for commands that look at the file itself and not
// through its format's driver: by path, or by options (--image-opts). Plain values; any thread.
#pragma once

#include <string>

#include "block/graph/options.h"
#include "cli/image_open.h"

namespace minivmm::cli {

struct NamedFile {
  std::string path;      // as messages and output name it; a path or an NBD URI where there is one
  std::string format;    // as given; empty: to be guessed
  block::Options file;   // opens the file alone
  block::Options image;  // what else was said: for the format's driver
  // It is nothing but a path: `file` says no more.
  bool is_path = true;
};

// Throws EINVAL for options that say nothing of a file, and as host_path().
NamedFile named_file(const ImageName& name);

// The same where it is to be opened by its path, with the files that it names: for commands that
// work on a chain of files. Throws ENOTSUP for options that say more of the file than its name.
NamedFile named_path(const ImageName& name);

}  // namespace minivmm::cli
