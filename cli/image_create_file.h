// SPDX-License-Identifier: Apache-2.0
// Makes image files: what `image create`, and the commands that write new images, have in common.
#pragma once

#include <string>
#include <string_view>

#include <optional>
#include <vector>

#include <boost/program_options.hpp>

#include "block/formats/luks/luks_create.h"
#include "cli/image_create_options.h"
#include "cli/image_open.h"

namespace minivmm::cli {

struct NewImage {
  std::string file_name;  // as given
  std::string path;
  std::string format;
  std::string purpose = {};  // in errors: "creating output image"; empty: "converting FORMAT"
  bool look_at_backing = true;
  bool no_flush = false;  // see FileAccess
  CreateOptionList options{"raw"};

  // What opening it afterwards needs beside its name: the id of its secret.
  NodeOptions open_options() const;
};

// True if an -o asked for the format's options, which are printed then; with those of a file where
// the names that were given include the new image's. (`target_is_last`: behind others.)
bool print_create_options(const boost::program_options::variables_map& values,
                          std::string_view format, bool target_is_last = false);

// Sets what -b and -F say. Throws EINVAL where the format has no backing files.
void set_backing(NewImage& image, const std::optional<std::string>& backing,
                 const std::optional<std::string>& format);

// What the driver makes of the options of a luks image. Throws what is wrong with them.
block::luks::CreateOptions luks_options(const CreateOptionList& options);

// Looks at the backing file, and fills in the size from it where none was asked for. Fiber of the
// graph's first loop.
void complete_image(ImageGraph& graph, NewImage& image);

// Makes the file hold an empty image; what it held is lost, unless something is wrong that can be
// known before. complete_image went before. Returns true if the file was not there before; after an
// error one that was not there is not there. Fiber of the graph's first loop.
bool make_image(ImageGraph& graph, const NewImage& image);

}  // namespace minivmm::cli
