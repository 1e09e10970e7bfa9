// SPDX-License-Identifier: Apache-2.0
// Driver `luks`: a disk that is encrypted as a whole, LUKS version 1. Options: file; key-secret
// (the id of the password's secret object, block/crypto/secret.h); unlock-time (seconds of
// processor time that trying the key slots may take, 30 if not said, block/crypto/luks1_unlock.h);
// discard=ignore| unmap.
//
// The size is what the file has behind the payload offset, in whole sectors. Data is encrypted and
// decrypted in buffers of ours: little of it in place, much in the work pool. Zeroes are written,
// encrypted; a hole would say where there are none, and decrypts to noise.
//
// Discards are ignored unless discard=unmap: they tell who sees the file which sectors are in use.
// Then the content of a discarded range is undefined: what was there, or noise.
#pragma once

#include <string>

#include <memory>
#include <vector>

#include "block/crypto/unlocked_luks.h"
#include "block/graph/driver.h"
#include "block/graph/edge.h"
#include "block/graph/node.h"

namespace minivmm::block {

// What `image info` says of a header; nothing of it is secret.
Facts luks_facts(const crypto::Luks1Header& header);

// The header of a file, without a password. Fiber. Throws EINVAL, ENOTSUP (luks1_header.h).
crypto::Luks1Header read_luks_header(Edge& file);

class LuksNode final : public Node {
 public:
  LuksNode(const NodeConfig& config, std::shared_ptr<Node> file,
           std::unique_ptr<crypto::UnlockedLuks> unlocked, bool discards);

  std::string filename() const override { return file_.node().filename(); }
  Facts facts() const override;
  std::vector<Edge*> children() override { return {&file_}; }

  // Adds or erases passwords, while the disk is in use. Fiber; one after the other. Throws EROFS,
  // and as amend_luks1.
  void amend(const crypto::Luks1AmendOptions& options);

 private:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override { file_.flush(); }
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  void driver_truncate(uint64_t new_size) override;
  void driver_prefetch(uint64_t offset, uint64_t length) override;

  Edge file_;
  const uint64_t payload_;  // bytes
  const std::unique_ptr<crypto::UnlockedLuks> unlocked_;
};

std::shared_ptr<Node> open_luks(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
