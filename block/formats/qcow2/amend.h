// SPDX-License-Identifier: Apache-2.0
// Changes of how an image is stored, while nobody has it open: version, features, the data file's
// name, the width of refcounts.
//
// Each is one write of the header's first sector, or of its first cluster where names change, after
// everything that it refers to is durable: cut short, the image is as before or as wanted, and at
// worst has leaked clusters.
#pragma once

#include <string>

#include <optional>

#include "block/graph/edge.h"
#include "block/graph/options.h"

namespace minivmm::block::qcow2 {

struct Header;

struct AmendOptions {
  std::optional<unsigned> version;
  std::optional<unsigned> refcount_order;
  std::optional<bool> lazy_refcounts;
  // Only as they are: `rebase` changes them.
  std::optional<std::string> backing_file;
  std::optional<std::string> backing_format;
  std::optional<std::string> data_file;
  std::optional<bool> data_file_raw;
};

// Takes compat, refcount_bits, lazy_refcounts, backing_file, backing_fmt, data_file, data_file_raw.
// Throws EINVAL.
AmendOptions take_amend_options(Options& options);

// Throws what is wrong with them for an image with this header, in qemu-img's words where it has
// some: EINVAL, ENOTSUP.
void check_amend_options(const AmendOptions& options, const Header& header);

// Before an image becomes one of version 2, which cannot say "zeroes": makes of zero clusters what
// it can say, unallocated ones or clusters of data. `disk` is the open image. Fiber.
void expand_zero_clusters(Edge& disk, bool has_backing);

// Does it. `file` is the image's, writable and resizable. For version 2 expand_zero_clusters went
// before. Durable on return. Fiber. Throws as check_amend_options, EINVAL for an image that a check
// finds corrupt where refcounts are rewritten, ERANGE where one does not fit the new width.
void amend_image(Edge& file, const AmendOptions& options);

}  // namespace minivmm::block::qcow2
