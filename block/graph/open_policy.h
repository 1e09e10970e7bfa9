// SPDX-License-Identifier: Apache-2.0
// What images may refer to. An image file is untrusted: a name recorded in it is followed only
// where the user's word or this policy allows it.
#pragma once

#include <string>

#include <memory>
#include <vector>

#include "block/graph/options.h"

namespace minivmm::block {

struct OpenPolicy {
  // Directories, besides the image's own, in which recorded backing files may lie.
  std::vector<std::string> backing_roots;
  // Refuse every recorded reference (for tools that inspect one untrusted file).
  bool follow_references = true;
};

// Options of the node for a backing file that `image` (a path) records as `reference` with format
// `format`. Allowed: a plain file name with a recorded format whose target, symbolic links
// resolved, is a regular file within the image's own directory or one of the backing roots.
// Everything else throws EACCES or ENOENT with a message that names the option that allows it.
// Blocking system calls: call in a pool.
Options backing_options(const OpenPolicy& policy, const std::string& image,
                        const std::string& reference, const std::string& format);

// The same for the external data file that an image records: taken as raw bytes. To be written it
// has to lie within the image's own directory.
Options data_file_options(const OpenPolicy& policy, const std::string& image,
                          const std::string& reference, bool writable);

}  // namespace minivmm::block
