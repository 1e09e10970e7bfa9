// SPDX-License-Identifier: Apache-2.0
// Opening: the header, the password, the key.
#include <memory>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "block/formats/luks/luks_node.h"
#include "block/graph/opening.h"

namespace minivmm::block {
namespace {

using base::Error;

}  // namespace

crypto::Luks1Header read_luks_header(Edge& file) {
  crypto::LuksArea area(file, 0, file.size());
  return crypto::read_luks1(area, true);
}

std::shared_ptr<Node> open_luks(Opening& opening, const NodeConfig& config, Options& options) {
  std::shared_ptr<Node> file = opening.open_child(options, "file", config.read_only);
  const crypto::UnlockOptions unlock = crypto::take_unlock_options(options);
  const bool discards = options.take_choice("discard", {"ignore", "unmap"}, 0) == 1;
  try {
    std::unique_ptr<crypto::UnlockedLuks> unlocked;
    {
      Edge edge(file, fmt::format("opening luks node '{}'", config.node_name),
                {.uses = 0, .shares = Permissions::kWrite | Permissions::kResize});
      crypto::LuksArea area(edge, 0, edge.size());
      unlocked = std::make_unique<crypto::UnlockedLuks>(area, true, unlock, "");
    }
    return std::make_shared<LuksNode>(config, std::move(file), std::move(unlocked), discards);
  } catch (Error& e) {
    e.prepend(file && !file->filename().empty() ? file->filename()
                                                : fmt::format("'{}'", config.node_name));
    throw;
  }
}

}  // namespace minivmm::block
