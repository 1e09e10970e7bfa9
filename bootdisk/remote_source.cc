// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/remote_source.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::bootdisk {

using base::Error;

void RemoteSource::read(uint64_t offset, std::span<std::byte> out) {
  if (offset > size_ || out.size() > size_ - offset) {
    throw Error(EINVAL, fmt::format("{} bytes at {} lie past the disk's end", out.size(), offset));
  }
  while (!out.empty()) {
    const Piece& from = piece(offset / kPiece * kPiece);
    const uint64_t skip = offset - from.offset;
    const uint64_t count = std::min<uint64_t>(out.size(), from.bytes.size() - skip);
    std::memcpy(out.data(), from.bytes.data() + skip, count);
    offset += count;
    out = out.subspan(count);
  }
}

const RemoteSource::Piece& RemoteSource::piece(uint64_t offset) {
  const auto found = std::find_if(pieces_.begin(), pieces_.end(),
                                  [&](const Piece& piece) { return piece.offset == offset; });
  if (found != pieces_.end()) {
    pieces_.splice(pieces_.begin(), pieces_, found);
    return pieces_.front();
  }
  Piece fresh{offset, std::vector<std::byte>(std::min(kPiece, size_ - offset))};
  fetch(offset, fresh.bytes);
  if (pieces_.size() == kPieces) pieces_.pop_back();
  pieces_.push_front(std::move(fresh));
  return pieces_.front();
}

void RemoteSource::fetch(uint64_t offset, std::span<std::byte> out) {
  channel_.send_value(Message{Kind::kRead, static_cast<uint32_t>(out.size()), offset});
  if (const auto err = channel_.receive_value<int32_t>(); err != 0) {
    throw Error(err, fmt::format("reading the disk at {} failed", offset));
  }
  channel_.receive(out);
}

}  // namespace minivmm::bootdisk
