// SPDX-License-Identifier: Apache-2.0
// Raw deflate (RFC 1951) that a reader with a window of 4 KiB can inflate, which is what readers of
// qcow2 have. For clusters: everything at once, and a search that is made for so short a memory.
//
// Why not zlib: it is written for windows of 32 KiB and for streams, and takes twice as long for
// the same size. The faster libraries know no window that short, or make more bytes.
//
// One thread at a time; about 150 KiB, which are kept.
#pragma once

#include <cstddef>
#include <span>

#include "block/formats/qcow2/deflate/block_writer.h"
#include "block/formats/qcow2/deflate/match_finder.h"

namespace minivmm::block::qcow2::deflate {

class Deflater {
 public:
  // `in`: at most 2 MiB. Returns how many bytes of `out` were filled; 0: they do not fit.
  size_t run(std::span<const std::byte> in, std::span<std::byte> out);

 private:
  MatchFinder finder_;
  BlockWriter writer_;
};

}  // namespace minivmm::block::qcow2::deflate
