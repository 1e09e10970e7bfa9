// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/amend.h"

#include <algorithm>
#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/error.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/header_update.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/repair.h"

namespace minivmm::block::qcow2 {

namespace {

using base::Error;

void require(bool good, const char* text) {
  if (!good) throw Error(EINVAL, text);
}

unsigned version_after(const AmendOptions& o, const Header& h) {
  return o.version.value_or(h.version);
}

// Whether an image can become one of version 2.
void check_downgrade(const AmendOptions& o, const Header& h) {
  if (const uint64_t features = h.incompatible & ~kIncompatDirty; features != 0) {
    throw Error(ENOTSUP, fmt::format("Cannot downgrade an image with incompatible features {:#x} "
                                     "set",
                                     features));
  }
  require(h.snapshots == 0, "Internal snapshots prevent downgrade of image");
  require(!h.bitmaps, "Dirty bitmaps prevent downgrade of image: remove them first");
  require(o.refcount_order.value_or(h.refcount_order) == 4,
          "compat=0.10 requires refcount_bits=16");
  require(!o.lazy_refcounts.value_or(false),
          "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 "
          "or greater)");
}

void check_version(const AmendOptions& o, const Header& h) {
  const unsigned version = version_after(o, h);
  if (version < h.version) check_downgrade(o, h);
  if (version > h.version && h.snapshots != 0) {
    throw Error(ENOTSUP,
                "Internal snapshots of a version 2 image prevent its upgrade: they lack what "
                "version 3 records of each");
  }
  if (version >= 3) return;
  require(o.refcount_order.value_or(4) == 4,
          "Refcount widths other than 16 bits require compatibility level 1.1 or above (use "
          "compat=1.1 or greater)");
  require(!o.lazy_refcounts.value_or(false),
          "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 "
          "or greater)");
}

void change_version(Header& h, unsigned version) {
  if (h.version == version) return;
  h.version = version;
  if (version < 3) {
    h.incompatible = h.compatible = h.autoclear = 0;
    h.header_length = kNumbersEndV2;
    h.more_fields.clear();
    h.feature_names.clear();
    return;
  }
  h.header_length = 112;
  h.feature_names = known_features();
}

void set_bit(uint64_t& bits, uint64_t bit, bool on) { bits = on ? bits | bit : bits & ~bit; }

void change_header(Header& h, const AmendOptions& o) {
  change_version(h, version_after(o, h));
  if (o.lazy_refcounts) set_bit(h.compatible, kCompatLazyRefcounts, *o.lazy_refcounts);
  if (o.data_file_raw) set_bit(h.autoclear, kAutoclearRawData, *o.data_file_raw);
  if (o.data_file) h.data_file = *o.data_file;
}

}  // namespace

AmendOptions take_amend_options(Options& options) {
  AmendOptions out;
  if (options.has("compat")) {
    const std::string compat = options.peek("compat").value_or("");
    if (compat != "0.10" && compat != "v2" && compat != "1.1" && compat != "v3") {
      throw Error(EINVAL, fmt::format("Unknown compatibility level {}", compat));
    }
    out.version = options.take_choice("compat", {"0.10", "v2", "1.1", "v3"}, 2) < 2 ? 2 : 3;
  }
  if (const auto bits = options.take_size("refcount_bits")) {
    require(std::has_single_bit(*bits) && *bits <= 64,
            "Refcount width must be a power of two and may not exceed 64 bits");
    out.refcount_order = static_cast<unsigned>(std::countr_zero(*bits));
  }
  if (options.has("lazy_refcounts"))
    out.lazy_refcounts = options.take_bool("lazy_refcounts", false);
  if (options.has("data_file_raw")) out.data_file_raw = options.take_bool("data_file_raw", false);
  out.backing_file = options.take_string("backing_file");
  out.backing_format = options.take_string("backing_fmt");
  out.data_file = options.take_string("data_file");
  return out;
}

void check_amend_options(const AmendOptions& o, const Header& h) {
  check_version(o, h);
  const bool external = h.geometry().external_data;
  require(!o.data_file || external,
          "data-file can only be set for images that use an external data file");
  require(!o.data_file_raw.value_or(false) || h.raw_data(),
          "data-file-raw cannot be set on existing images");
  const bool same_backing = o.backing_file.value_or("") == h.backing_file &&
                            o.backing_format.value_or("") == h.backing_format;
  require(same_backing || (!o.backing_file && !o.backing_format),
          "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.");
}

void expand_zero_clusters(Edge& disk, bool has_backing) {
  constexpr uint64_t kPiece = 1 << 20;
  base::Buffer zeroes = base::Buffer::zeroed(kPiece);
  for (uint64_t at = 0; at < disk.size();) {
    const BlockStatus status = disk.block_status(at, disk.size() - at);
    const uint64_t end = at + status.length;
    const bool expand = status.zero && status.allocated && status.depth == 0;
    if (expand && !has_backing) disk.discard(at, status.length);
    while (expand && has_backing && at < end) {
      const uint64_t now = std::min(kPiece, end - at);
      disk.write(at, base::SingleBuffer(zeroes.span().first(now)));
      at += now;
    }
    at = end;
  }
  disk.flush();
}

void amend_image(Edge& file, const AmendOptions& options) {
  const Header header = read_header(file);
  require_supported(header);
  check_amend_options(options, header);
  // Version 3 first: version 2 has no other widths.
  if (options.refcount_order && *options.refcount_order != header.refcount_order &&
      header.version >= 3) {
    change_refcount_width(file, *options.refcount_order);
  }
  HeaderUpdate update(file, read_header(file));
  update.rewrite([&](Header& h) { change_header(h, options); });
  if (options.refcount_order && header.version < 3 && *options.refcount_order != 4) {
    change_refcount_width(file, *options.refcount_order);
  }
}

}  // namespace minivmm::block::qcow2
