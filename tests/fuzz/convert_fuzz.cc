// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is a qcow2 image. Its disk is copied as `image convert` does, twice: both
// copies are the same, or both attempts fail.
#include <cstdlib>
#include <optional>
#include <vector>

#include "base/loop_group.h"
#include "block/jobs/copy_job.h"
#include "tests/fuzz/qcow2_input.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kMostDisk = 2 << 20;

// The disk's content; nothing where it cannot be read.
std::optional<std::vector<std::byte>> copied(base::LoopGroup& loops,
                                             const std::shared_ptr<Qcow2Node>& node,
                                             uint64_t request) {
  Edge disk(node, "convert", {0, 0});
  const uint64_t size = disk.size();
  auto target_node = std::make_shared<MemoryNode>(NodeConfig{"target", false}, size);
  Edge target(target_node, "convert", Permissions::front_end(true));
  DiskSource source(disk, size);
  try {
    CopyJob job(source, "disk", target, "target",
                {.request = request, .requests = 3, .target_is_zero = true});
    job.run(loops);
  } catch (const base::Error&) {
    return std::nullopt;
  }
  std::vector<std::byte> out(size);
  target.read(0, base::SingleBuffer(out.data(), out.size()));
  return out;
}

}  // namespace

void use_image(base::LoopGroup& loops, std::span<const std::byte> image) {
  loops.loop(0).call("fuzz", [&] {
    ignore_errors([&] {
      const auto node = open_image(make_file(image), true);
      if (node->size() == 0 || node->size() > kMostDisk) return;
      const auto one = copied(loops, node, 4096);
      const auto other = copied(loops, node, 1 << 16);
      if (one != other) std::abort();
      node->close();
    });
  });
}

}  // namespace minivmm::block
