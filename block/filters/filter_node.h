// SPDX-License-Identifier: Apache-2.0
// A node that hands every request to its one child: what filters override a part of. Size and
// limits are the child's.
#pragma once

#include <memory>

#include "block/graph/driver.h"
#include "block/graph/edge.h"
#include "block/graph/node.h"

namespace minivmm::block {

class FilterNode : public Node {
 public:
  FilterNode(const NodeConfig& config, const char* driver, std::shared_ptr<Node> file);

  std::string filename() const override { return file_.node().filename(); }
  std::vector<Edge*> children() override { return {&file_}; }
  Snapshots* snapshots() noexcept override { return file_.node().snapshots(); }
  DirtyBitmaps* dirty_bitmaps() noexcept override { return file_.node().dirty_bitmaps(); }

 protected:
  void driver_read(uint64_t offset, IoSpan to) override { file_.read(offset, to); }
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override { file_.discard(offset, length); }
  void driver_flush() override { file_.flush(); }
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override {
    return file_.block_status(offset, length);
  }
  void driver_truncate(uint64_t new_size) override;
  void driver_preallocate(uint64_t offset, uint64_t length, Preallocation how) override {
    file_.preallocate(offset, length, how);
  }
  void driver_prefetch(uint64_t offset, uint64_t length) override {
    file_.prefetch(offset, length);
  }
  void driver_start_writeback(uint64_t offset, uint64_t length) noexcept override {
    file_.start_writeback(offset, length);
  }
  Edge& file() noexcept { return file_; }

 private:
  Edge file_;
};

}  // namespace minivmm::block
