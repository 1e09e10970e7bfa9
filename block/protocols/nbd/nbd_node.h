// SPDX-License-Identifier: Apache-2.0
// Driver `nbd`: an export of an NBD server, by libnbd. Options: target.h.
//
// With reconnect-delay a flush covers what was written before the server was restarted, even where
// that was killed with unflushed writes: they are kept here until they are flushed (up to
// kMaxUnflushed, then the node flushes by itself) and done again.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "block/graph/driver.h"
#include "block/graph/node.h"
#include "block/protocols/nbd/pool.h"

namespace minivmm::block {

class NbdNode final : public Node {
 public:
  NbdNode(const NodeConfig& config, std::shared_ptr<NbdPool> pool);

  Facts facts() const override;
  void closing() noexcept override { pool_->limit_waits(); }
  void close() override;

 private:
  static constexpr uint64_t kMaxUnflushed = uint64_t{64} << 20;

  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  void driver_prefetch(uint64_t offset, uint64_t length) override;

  // Runs it and throws the server's error.
  void run(NbdCommand& command, const char* what);
  // A change of content, `data` being a copy of what a write brings.
  void change(NbdCommand& command, const char* what, base::Buffer data, bool fua);
  // The same for a range of any length, which is cut to what a request can tell.
  void change_range(NbdCommand::Kind kind, uint64_t offset, uint64_t length, uint32_t flags,
                    const char* what, bool fua);

  const std::shared_ptr<NbdPool> pool_;
  const NbdExport& info_;
  // Bytes that the server acknowledged, and how many of them the last flush covered.
  std::atomic<uint64_t> acknowledged_{0};
  std::atomic<uint64_t> flushed_{0};
};

std::shared_ptr<Node> open_nbd(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
