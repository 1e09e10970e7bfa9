// SPDX-License-Identifier: Apache-2.0
// Driver `raw`: the bytes of its file, or a range of them. Options: file, offset, size.
//
// A disk that was taken for raw only because it looked like nothing else (`probed` on) refuses
// changes that would make its beginning look like another format: otherwise a guest could write an
// image header that names any file of the host, to be followed when the disk is next opened.
// Changes of the beginning go one after the other, and what was looked at is what is written: the
// guest may change its buffers meanwhile.
#pragma once

#include <memory>
#include <optional>
#include <span>

#include "base/sync.h"
#include "block/graph/driver.h"
#include "block/graph/edge.h"
#include "block/graph/node.h"

namespace minivmm::block {

struct RawRange {
  uint64_t offset = 0;
  std::optional<uint64_t> size;  // nullopt: to the end of the file, also when that moves
};

class RawNode final : public Node {
 public:
  RawNode(const NodeConfig& config, std::shared_ptr<Node> file, RawRange range, bool probed);

  std::string filename() const override { return file_.node().filename(); }
  Facts facts() const override { return file_.node().facts(); }
  std::vector<Edge*> children() override { return {&file_}; }

 private:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override { file_.flush(); }
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  void driver_truncate(uint64_t new_size) override;
  void driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                         uint64_t from_offset) override;
  void driver_copy_out(uint64_t offset, uint64_t length, const TakePiece& take) override {
    file_.copy_out(range_.offset + offset, length, take);
  }
  bool driver_lend(uint64_t offset, uint64_t length, Loan& to) noexcept override {
    return file_.lend(range_.offset + offset, length, to);
  }
  void driver_prefetch(uint64_t offset, uint64_t length) override;
  void driver_start_writeback(uint64_t offset, uint64_t length) noexcept override {
    file_.start_writeback(range_.offset + offset, length);
  }

  bool guards(uint64_t offset) const noexcept;
  void write_guarded(uint64_t offset, IoSpan from, WriteFlags flags);
  void require_raw(std::span<const std::byte> beginning) const;
  void before_growth(uint64_t end) const;

  Edge file_;
  const RawRange range_;
  const bool guarded_;
  base::FiberMutex beginning_;  // one change of the guarded beginning at a time
};

std::shared_ptr<Node> open_raw(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
