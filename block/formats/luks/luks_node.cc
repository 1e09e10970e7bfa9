// SPDX-License-Identifier: Apache-2.0
#include "block/formats/luks/luks_node.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"

namespace minivmm::block {
namespace {

using base::Error;
using crypto::kSectorSize;
using Direction = crypto::SectorCipher::Direction;

// Bounds the buffer of a request.
constexpr uint64_t kMaxTransfer = 1 << 20;

uint64_t payload_size(uint64_t file_size, uint64_t payload) {
  if (file_size <= payload) return 0;
  return base::align_down<uint64_t>(file_size - payload, kSectorSize);
}

}  // namespace

Facts luks_facts(const crypto::Luks1Header& header) {
  Facts out;
  out.emplace_back("ivgen-alg", iv_generator_name(header.cipher.iv));
  if (header.cipher.iv == crypto::IvGenerator::kEssiv) {
    out.emplace_back("ivgen-hash-alg", hash_name(header.cipher.iv_hash));
  }
  out.emplace_back("hash-alg", hash_name(header.hash));
  out.emplace_back("cipher-alg", cipher_algorithm_name(header.cipher.algorithm));
  out.emplace_back("uuid", header.uuid);
  out.emplace_back("cipher-mode", cipher_mode_name(header.cipher.mode));
  for (size_t i = 0; i < crypto::kLuks1Slots; ++i) {
    const crypto::Luks1Slot& slot = header.slots[i];
    const std::string name = fmt::format("slots.{}.", i);
    out.emplace_back(name + "active", slot.active);
    if (slot.active) out.emplace_back(name + "iters", uint64_t{slot.iterations});
    out.emplace_back(name + "key-offset", slot.material_offset());
    if (slot.active) out.emplace_back(name + "stripes", uint64_t{slot.stripes});
  }
  out.emplace_back("payload-offset", header.payload_offset());
  out.emplace_back("master-key-iters", uint64_t{header.mk_iterations});
  return out;
}

LuksNode::LuksNode(const NodeConfig& config, std::shared_ptr<Node> file,
                   std::unique_ptr<crypto::UnlockedLuks> unlocked, bool discards)
    : Node(config.node_name, "luks", config.read_only),
      file_(std::move(file), fmt::format("luks node '{}'", config.node_name),
            Permissions::format_file(!config.read_only)),
      payload_(unlocked->header().payload_offset()),
      unlocked_(std::move(unlocked)) {
  const Limits& below = file_.node().limits();
  set_limits({.request_alignment = kSectorSize,
              .max_transfer = kMaxTransfer,
              .optimal_io = below.optimal_io,
              .discard_granularity = below.discard_granularity,
              .can_discard = discards && below.can_discard});
  set_size(payload_size(file_.size(), payload_));
}

Facts LuksNode::facts() const { return luks_facts(unlocked_->header()); }

void LuksNode::amend(const crypto::Luks1AmendOptions& options) {
  if (read_only()) {
    throw Error(EROFS, fmt::format("{}: amend: the node is read-only", describe()));
  }
  crypto::LuksArea area(file_, 0, payload_);
  unlocked_->amend(area, options);
}

void LuksNode::driver_read(uint64_t offset, IoSpan to) {
  base::Buffer buffer(to.bytes());
  file_.read(payload_ + offset, buffer.io());
  unlocked_->cipher().crypt_on_fiber(Direction::kDecrypt, offset / kSectorSize, buffer.span());
  base::copy_to(to, 0, buffer.span());
}

void LuksNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  base::Buffer buffer(from.bytes());
  base::copy_from(from, 0, buffer.span());
  unlocked_->cipher().crypt_on_fiber(Direction::kEncrypt, offset / kSectorSize, buffer.span());
  file_.write(payload_ + offset, buffer.io(), flags);
  grow_size(offset + from.bytes());
}

void LuksNode::driver_discard(uint64_t offset, uint64_t length) {
  file_.discard(payload_ + offset, length);
}

BlockStatus LuksNode::driver_block_status(uint64_t, uint64_t length) {
  // Also where the file has a hole: it reads as noise.
  return {.length = length, .data = true, .allocated = true};
}

void LuksNode::driver_truncate(uint64_t new_size) {
  if (new_size > kMaxDiskSize - payload_) {
    throw Error(EFBIG,
                fmt::format("{}: the disk and its LUKS header would be too large", describe()));
  }
  const uint64_t size = base::align_up<uint64_t>(new_size, kSectorSize);
  file_.truncate(payload_ + size);
  set_size(size);
}

void LuksNode::driver_prefetch(uint64_t offset, uint64_t length) {
  file_.prefetch(payload_ + offset, length);
}

}  // namespace minivmm::block
