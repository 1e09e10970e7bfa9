// SPDX-License-Identifier: Apache-2.0
#include "cli/image_facts.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/probe.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/listing.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace crypto = block::crypto;
using base::Error;

bool is_format(std::string_view name) noexcept {
  return name == "qcow2" || name == "raw" || name == "luks";
}

std::string image_format(block::Edge& file, const std::string& path, const std::string& given) {
  if (is_format(given)) return given;
  if (!given.empty()) {
    throw Error(EINVAL, fmt::format("{}: Unknown driver '{}'{}", path, given,
                                    hint(" (qcow2, raw and luks are supported)")));
  }
  base::Buffer first(block::kProbeBytes);
  file.read(0, first.io());
  const auto bytes = first.span().first(std::min<uint64_t>(first.size(), file.size()));
  std::string found(block::probe_format(bytes));
  if (is_format(found)) return found;
  throw Error(ENOTSUP,
              fmt::format("{}: the file looks like {}, which is not supported (-f raw takes "
                          "its bytes as they are)",
                          path, found));
}

namespace {

std::optional<uint64_t> actual_size(const block::Node& file) {
  for (const auto& [name, value] : file.facts()) {
    const auto* number = std::get_if<uint64_t>(&value);
    if (name == "actual-size" && number != nullptr) return *number;
  }
  return std::nullopt;
}

// Fiber.
ImageFacts inspect(block::Edge& file, const std::string& path, const std::string& format) {
  ImageFacts out;
  out.path = path;
  out.format = image_format(file, path, format);
  out.actual_size = actual_size(file.node());
  // Raw sizes in whole sectors, as qemu-img states them.
  out.virtual_size = base::align_up<uint64_t>(file.size(), 512);
  if (out.format == "raw") return out;
  try {
    if (out.format == "luks") {
      out.luks = block::read_luks_header(file);
      const uint64_t payload = std::min(out.luks->payload_offset(), file.size());
      out.virtual_size = base::align_down<uint64_t>(file.size() - payload, 512);
      return out;
    }
    out.qcow2 = block::qcow2::read_header(file);
    if (out.qcow2->luks) {
      crypto::LuksArea area = block::qcow2::luks_area(file, *out.qcow2);
      out.luks = crypto::read_luks1(area, false);
    }
    out.snapshots = block::qcow2::read_snapshots(file, *out.qcow2);
    out.bitmaps = block::qcow2::read_bitmaps(file, *out.qcow2);
  } catch (Error& e) {
    e.prepend(path);
    throw;
  }
  out.virtual_size = out.qcow2->size;
  return out;
}

}  // namespace

ImageFacts inspect_image(ImageGraph& graph, const std::string& path, const std::string& format,
                         const FileAccess& access) {
  return graph.use_file(path, access,
                        [&](block::Edge& file) { return inspect(file, path, format); });
}

ImageFacts inspect_image(ImageGraph& graph, const NamedFile& image, const FileAccess& access) {
  ImageFacts out = graph.use_file(image.file, access, [&](block::Edge& file) {
    return inspect(file, image.path, image.format);
  });
  if (out.format != "raw") return out;
  // A part of a file.
  block::Options range = image.image;
  const uint64_t offset = range.take_size("offset").value_or(0);
  out.virtual_size -= std::min(offset, out.virtual_size);
  if (const auto size = range.take_size("size")) out.virtual_size = *size;
  return out;
}

}  // namespace minivmm::cli
