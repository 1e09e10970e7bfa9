// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is a qcow2 image. It is checked, read, and then written to; whatever it
// says, that ends in an error or in success, within the bounds of this driver.
#include <vector>

#include "base/loop_group.h"
#include "block/formats/qcow2/check.h"
#include "tests/fuzz/qcow2_input.h"

namespace minivmm::block {
namespace {

constexpr size_t kBuffer = 8192;

void read_some(Edge& disk) {
  std::vector<std::byte> buffer(kBuffer);
  const uint64_t size = disk.size();
  for (uint64_t i = 0; i < 8 && size != 0; ++i) {
    const uint64_t offset = size / 8 * i;
    const uint64_t length = std::min<uint64_t>(kBuffer, size - offset);
    ignore_errors([&] { disk.read(offset, base::SingleBuffer(buffer.data(), length)); });
    ignore_errors([&] { disk.block_status(offset, size - offset); });
  }
}

void write_some(Edge& disk) {
  const std::vector<std::byte> buffer(kBuffer, std::byte{0x5a});
  const uint64_t size = disk.size();
  for (uint64_t i = 0; i < 8 && size != 0; ++i) {
    const uint64_t offset = size / 8 * i + (i % 2 != 0 ? 0 : size / 16);
    const uint64_t length = std::min<uint64_t>(kBuffer, size - offset);
    ignore_errors([&] {
      disk.write(offset, base::SingleBuffer(static_cast<const void*>(buffer.data()), length));
    });
    ignore_errors([&] { disk.write_zeroes(offset, length / 2, {.may_unmap = i % 3 == 0}); });
    ignore_errors([&] { disk.discard(offset, length); });
    if (i % 3 == 0) ignore_errors([&] { disk.flush(); });
  }
}

void use_disk_image(std::span<const std::byte> image) {
  const auto file = make_file(image);
  ignore_errors([&] {
    Edge edge(file, "check", {});
    qcow2::check_image(edge, [](const std::string&) {});
  });
  for (const bool read_only : {true, false}) {
    ignore_errors([&] {
      const auto node = open_image(file, read_only);
      {
        Edge disk(node, "guest", Permissions::front_end(!read_only));
        read_some(disk);
        if (!read_only) write_some(disk);
        read_some(disk);
      }
      node->close();
    });
  }
}

}  // namespace

void use_image(base::LoopGroup& loops, std::span<const std::byte> image) {
  loops.loop(0).call("fuzz", [&] { use_disk_image(image); });
}

}  // namespace minivmm::block
