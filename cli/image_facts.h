// SPDX-License-Identifier: Apache-2.0
// What an image file says of itself, read from its metadata without opening anything that it
// names and without the format's driver: so it works for images that the driver refuses.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>
#include <vector>

#include "block/crypto/luks1_header.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/tables.h"
#include "cli/image_named_file.h"

namespace minivmm::cli {

struct ImageFacts {
  std::string path;
  std::string format;
  uint64_t virtual_size = 0;
  // What the file takes of its file system; not known of a server's disk.
  std::optional<uint64_t> actual_size;
  std::optional<block::qcow2::Header> qcow2;
  std::optional<block::crypto::Luks1Header> luks;  // of an encrypted image
  std::vector<block::qcow2::SnapshotEntry> snapshots;
  std::vector<block::qcow2::BitmapEntry> bitmaps;

  bool has_backing() const noexcept { return qcow2 && qcow2->has_backing; }
  // Where the recorded name leads. Not opened, perhaps not there.
  std::string full_backing_path() const { return path_from_image(path, qcow2->backing_file); }
};

// The formats that there are.
bool is_format(std::string_view name) noexcept;
// The format to take a file for: `given`, or what its first bytes look like. Throws EINVAL for a
// format that is not supported. Fiber.
std::string image_format(block::Edge& file, const std::string& path, const std::string& given);

// Fiber of the graph's first loop. Throws base::Error that begins with the path.
ImageFacts inspect_image(ImageGraph& graph, const std::string& path, const std::string& format,
                         const FileAccess& access);
ImageFacts inspect_image(ImageGraph& graph, const NamedFile& image, const FileAccess& access);

}  // namespace minivmm::cli
