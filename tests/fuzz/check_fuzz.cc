// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is a qcow2 image. It is checked, its lost space is freed, it is repaired,
// and checked again. What a repair of everything calls sound has to be sound.
#include <cstdlib>

#include "base/loop_group.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/repair.h"
#include "tests/fuzz/qcow2_input.h"

namespace minivmm::block {
namespace {

void use_disk_image(std::span<const std::byte> image) {
  const auto quiet = [](const std::string&) {};
  for (const qcow2::Repair what : {qcow2::Repair::kLeaks, qcow2::Repair::kAll}) {
    const auto file = make_file(image);
    Edge edge(file, "check", Permissions::format_file(true));
    ignore_errors([&] {
      (void)qcow2::check_image(edge, quiet);
      const auto done = qcow2::repair_image(edge, what, quiet);
      const auto again = qcow2::check_image(edge, quiet);
      if (again.corruptions != done.left.corruptions || again.leaks != done.left.leaks)
        std::abort();
    });
  }
}

}  // namespace

void use_image(base::LoopGroup& loops, std::span<const std::byte> image) {
  loops.loop(0).call("fuzz", [&] { use_disk_image(image); });
}

}  // namespace minivmm::block
