// SPDX-License-Identifier: Apache-2.0
// Changes of qcow2 files as a whole, while nobody has them open.
//
// Fiber of the graph's first loop.
#pragma once

#include <string>

#include "cli/image_graph.h"

namespace minivmm::cli {

// Records another backing file ("": none). Everything else in the header stays as it is. Durable on
// return; one write, so after a failure the old name or the new one is there. Throws base::Error.
void change_backing_name(ImageGraph& graph, const std::string& path, const std::string& backing,
                         const std::string& backing_format);

// Makes an overlay of which everything has been committed empty again, in place of the file, in one
// step: an empty one of the same kind is made beside it and takes its name. False: the image holds
// more than its disk (snapshots, bitmaps, features that a new one would not have), or its directory
// cannot be written to; then it stays as it is.
bool replace_by_empty(ImageGraph& graph, const std::string& path);

}  // namespace minivmm::cli
