// SPDX-License-Identifier: Apache-2.0
// Changes to the header of an open image: one at a time, each durable when it returns, each
// starting from what the last one left.
//
// The numbers that a running image changes (sizes, offsets of tables, feature bits) lie in the
// first sector and are written at once: a crash leaves the old ones or the new ones. Extensions and
// the backing file's name may reach over sectors: those that change are written one by one, in an
// order in which each state reads as the old header or the new one (header_sectors.h), after the
// name has been moved out of the way where that helps. Where there is no such order, which takes
// hundreds of bytes of extensions in both, it is one write, and the bitmaps do not count meanwhile.
//
// Owned by ImageFile. Any loop, on fibers. After an error the header on disk is the old one or the
// new one, current() is the old one, and the next change writes all the numbers again.
#pragma once

#include <functional>

#include "base/sync.h"
#include "block/formats/qcow2/header.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

class HeaderUpdate {
 public:
  using Change = std::function<void(Header& header)>;

  // `file` is the image's, `header` what it has now.
  HeaderUpdate(Edge& file, Header header);

  // As it is now: a copy, because it changes.
  Header current() const;

  // `change` sets the numbers from `size` to `autoclear`; what else it sets is not written.
  void change_numbers(const Change& change);
  // `change` sets anything but the cluster size. Extensions of unknown types and fields behind the
  // known ones stay. Throws EINVAL, with nothing written, if the header would no
  // longer fit its cluster.
  void rewrite(const Change& change);

 private:
  void write(uint64_t offset, std::span<const std::byte> bytes);
  void write_numbers(const Header& wanted);
  bool write_sectors(std::vector<std::byte>& now, const std::vector<std::byte>& wanted);
  uint64_t move_name_away(std::vector<std::byte>& now);

  Edge& file_;
  mutable base::FiberMutex changing_;
  Header header_;  // guarded by changing_
};

}  // namespace minivmm::block::qcow2
