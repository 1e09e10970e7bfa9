// SPDX-License-Identifier: Apache-2.0
// Empty qcow2 overlays for throw-away disks: what `snapshot=on` and clone exports are made of.
#pragma once

#include <string>

#include <memory>

#include "base/unique_fd.h"
#include "block/formats/qcow2/create.h"
#include "block/graph/graph.h"

namespace minivmm::control {

// $TMPDIR, or /var/tmp.
std::string temporary_folder();

// A file in `folder` that nobody sees and that is gone when it is closed, however that comes.
// Throws, saying what to do.
base::UniqueFd nameless_file(const std::string& folder);

// Makes a node hold an empty qcow2 image. Fiber. Throws.
void format_overlay(std::shared_ptr<block::Node> file, const block::qcow2::CreateOptions& options);

// The options of a qcow2 node with a file and a backing file that are nodes already.
block::Options overlay_options(const std::string& node_name, const std::string& file,
                               const std::string& backing);

}  // namespace minivmm::control
