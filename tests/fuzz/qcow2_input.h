// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets on qcow2 images share: the input as a file in memory, and a mutator that
// knows where things lie, so that most mutations get past the header.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <span>

#include "base/bytes.h"
#include "base/error.h"
#include "base/loop_group.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/protocols/memory.h"

// libFuzzer's own mutator; not there where the corpus is only replayed.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most) __attribute__((weak));

namespace minivmm::block {

// What a target does with an input (qcow2_main.cc calls it). On a plain thread; `loops` has one.
void use_image(base::LoopGroup& loops, std::span<const std::byte> image);

inline constexpr uint64_t kRoomToGrow = 256 << 10;

template <typename Body>
void ignore_errors(Body&& body) {
  try {
    body();
  } catch (const base::Error&) {
  }
}

// The image in memory, with some room to grow.
inline std::shared_ptr<Node> make_file(std::span<const std::byte> image) {
  auto file = std::make_shared<MemoryNode>(NodeConfig{"file", false}, image.size() + kRoomToGrow);
  Edge edge(file, "fuzz", Permissions::format_file(true));
  edge.truncate(image.size());
  edge.write(0, base::SingleBuffer(image));
  return file;
}

// Throws what opening finds. Not encrypted images: no key would fit.
inline std::shared_ptr<Qcow2Node> open_image(std::shared_ptr<Node> file, bool read_only) {
  qcow2::Header header;
  {
    Edge edge(file, "open", {0, Permissions::kWrite | Permissions::kResize});
    header = qcow2::read_header(edge);
    qcow2::require_supported(header);
  }
  if (header.crypt_method != 0) throw base::Error(ENOTSUP, "encrypted");
  const auto sizes =
      qcow2::choose_cache_sizes(header, std::nullopt, 64 << 10, std::nullopt, std::nullopt);
  // Where the image asks for a data file it gets one.
  std::shared_ptr<Node> data;
  if (header.geometry().external_data) {
    data = std::make_shared<MemoryNode>(NodeConfig{"data", false}, kRoomToGrow);
  }
  Qcow2Node::Children children{std::move(file), std::move(data), nullptr};
  return std::make_shared<Qcow2Node>(NodeConfig{"disk", read_only}, std::move(children),
                                     std::move(header), sizes);
}

// Changes one thing of an image whose header is plausible, and keeps it so: an entry of a table, a
// pointer of the header, an extension. Others (and some of these) get libFuzzer's own mutations.
inline size_t mutate_qcow2(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::minstd_rand random(seed);
  const auto pick = [&](uint64_t n) { return n == 0 ? 0 : random() % n; };
  const auto generic = [&] {
    return LLVMFuzzerMutate != nullptr ? LLVMFuzzerMutate(data, size, most) : size;
  };
  if (size < 112 || pick(4) == 0) return generic();
  // SAFETY: octets as bytes.
  auto* bytes = reinterpret_cast<std::byte*>(data);
  const auto bits = base::load_be<uint32_t>(bytes + 20);
  if (bits < 9 || bits > 16) return generic();
  const uint64_t cluster = uint64_t{1} << bits;
  // Values that mean something in most places.
  const auto value = [&]() -> uint64_t {
    const uint64_t place = pick(size / cluster + 2) << bits;
    const uint64_t flags[] = {0, uint64_t{1} << 63, uint64_t{1} << 62, 1, uint64_t{3} << 62};
    const uint64_t odd[] = {0,           ~uint64_t{0},      uint64_t{1} << 63, size,
                            cluster - 1, uint64_t{1} << 56, 0x00fffffffffffe00};
    return pick(4) == 0 ? odd[pick(std::size(odd))] : place | flags[pick(std::size(flags))];
  };
  const auto put = [&](uint64_t at, uint64_t what) {
    if (at <= size - 8) base::store_be(bytes + at, what);
  };
  const auto entry_of = [&](uint64_t table) { return table + pick(16) * 8; };
  const uint64_t l1 = base::load_be<uint64_t>(bytes + 40);
  const uint64_t refcounts = base::load_be<uint64_t>(bytes + 48);
  const auto behind = [&](uint64_t table) -> uint64_t {
    const uint64_t at = entry_of(table);
    return at <= size - 8 ? base::load_be<uint64_t>(bytes + at) & 0x00fffffffffffe00 : 0;
  };
  switch (pick(8)) {
    case 0:
      put(entry_of(l1), value());
      break;
    case 1:
    case 2:
    case 3:
      put(entry_of(behind(l1)), value());
      break;
    case 4:
      put(entry_of(refcounts), value());
      break;
    case 5:
      put(entry_of(behind(refcounts)), value());
      break;
    case 6:  // table offsets and counts, feature bits
      put(std::array<uint64_t, 6>{36, 40, 48, 60, 64, 72}[pick(6)], value());
      break;
    default:  // extensions
      put(104 + pick(64) * 8, value());
  }
  return size;
}

}  // namespace minivmm::block
