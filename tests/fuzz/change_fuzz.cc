// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is a qcow2 image, and chooses what is done to it: compressed and plain
// writes, snapshots, bitmaps, resizing. An image that was sound is sound afterwards,
// whatever failed on the way.
#include <string>

#include <cstdlib>
#include <vector>

#include "block/formats/qcow2/check.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/snapshots.h"
#include "tests/fuzz/qcow2_input.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kMostDisk = 4 << 20;

bool is_sound(const std::shared_ptr<Node>& file) {
  Edge edge(file, "check", {});
  const auto result = qcow2::check_image(edge, [](const std::string&) {});
  return result.corruptions + result.check_errors == 0;
}

void write_some(Edge& disk, uint64_t at, bool compressed) {
  const uint64_t unit = std::max<uint64_t>(disk.node().limits().optimal_io, 512);
  const uint64_t offset = disk.size() == 0 ? 0 : at * 4096 % disk.size() / unit * unit;
  const uint64_t length = std::min(2 * unit, disk.size() - offset);
  const std::vector<std::byte> bytes(length, static_cast<std::byte>(at));
  const base::SingleBuffer from(static_cast<const void*>(bytes.data()), length);
  if (compressed) {
    disk.write_compressed(offset, from);
  } else {
    disk.write(offset + length / 4,
               base::SingleBuffer(static_cast<const void*>(bytes.data()), length / 2));
  }
}

void change(const std::shared_ptr<Qcow2Node>& node, unsigned what, uint64_t at) {
  if (what < 5) {
    Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
    if (what < 3) write_some(disk, at, what != 0);
    if (what == 3 && disk.size() != 0) {
      const uint64_t offset = at * 4096 % disk.size();
      disk.discard(offset, std::min<uint64_t>(96 << 10, disk.size() - offset));
    }
    if (what == 4) disk.truncate(at * 4096 % kMostDisk);
    return;
  }
  const std::string name(1, static_cast<char>('a' + at % 3));
  if (what == 5) (void)node->snapshots()->create(name);
  if (what == 6) node->snapshots()->apply(name);
  if (what == 7) node->snapshots()->remove(name);
  if (what == 8) node->dirty_bitmaps()->add(name, 4096, true);
  if (what == 9) node->dirty_bitmaps()->remove(name);
}

void change_image(std::span<const std::byte> image) {
  const auto file = make_file(image);
  bool sound = false;
  ignore_errors([&] { sound = is_sound(file); });
  std::shared_ptr<Qcow2Node> node;
  ignore_errors([&] { node = open_image(file, false); });
  if (!node) return;
  if (node->size() <= kMostDisk) {
    uint64_t sum = 0;
    for (const std::byte b : image) sum = sum * 31 + std::to_integer<uint64_t>(b);
    std::minstd_rand random(static_cast<unsigned>(sum ^ sum >> 32));
    for (int i = 0; i < 16; ++i) {
      const auto what = static_cast<unsigned>(random() % 10);
      ignore_errors([&] { change(node, what, random() % 1024); });
    }
  }
  ignore_errors([&] { node->close(); });
  node.reset();
  if (sound && !is_sound(file)) std::abort();
}

}  // namespace

void use_image(base::LoopGroup& loops, std::span<const std::byte> image) {
  loops.loop(0).call("fuzz", [&] { change_image(image); });
}

}  // namespace minivmm::block
