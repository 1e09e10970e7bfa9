// SPDX-License-Identifier: Apache-2.0
// Opening: the header, the password, the key.
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/kdf.h"
#include "block/crypto/secret.h"
#include "block/formats/luks/luks_node.h"
#include "block/graph/graph.h"

namespace minivmm::block {
namespace {

using base::Error;
using crypto::SectorCipher;

// Hours would only be a way to hang.
constexpr uint64_t kMaxUnlockSeconds = 3600;

struct Unlocked {
  crypto::Luks1Header header;
  crypto::Luks1Key key;
  std::unique_ptr<SectorCipher> cipher;
};

Unlocked unlock(const NodeConfig& config, const std::shared_ptr<Node>& file,
                const std::string& secret, std::chrono::milliseconds limit) {
  Edge edge(file, fmt::format("opening luks node '{}'", config.node_name),
            {.uses = 0, .shares = Permissions::kWrite | Permissions::kResize});
  Unlocked out;
  out.header = read_luks_header(edge);
  if (secret.empty()) {
    throw Error(EINVAL,
                "Parameter 'key-secret' is required for cipher: the id of a secret object "
                "that holds the password");
  }
  const crypto::SecureBytes password = crypto::secrets().get(secret);
  crypto::LuksArea area(edge, 0, edge.size());
  out.key = crypto::unlock_luks1(area, out.header, password.span(), limit);
  out.cipher = crypto::key_pool().run(
      [&] { return std::make_unique<SectorCipher>(out.header.cipher, out.key.master.span()); });
  return out;
}

}  // namespace

crypto::Luks1Header read_luks_header(Edge& file) {
  crypto::LuksArea area(file, 0, file.size());
  return crypto::read_luks1(area, true);
}

std::shared_ptr<Node> open_luks(Graph& graph, const NodeConfig& config, Options& options) {
  std::shared_ptr<Node> file = graph.open_child(options, "file", config.read_only);
  const std::string secret = options.take_string("key-secret").value_or("");
  const auto seconds = options.take_uint(
      "unlock-time", static_cast<uint64_t>(crypto::kDefaultUnlockTime.count()) / 1000, 1,
      kMaxUnlockSeconds);
  const bool discards = options.take_choice("discard", {"ignore", "unmap"}, 0) == 1;
  try {
    Unlocked unlocked = unlock(config, file, secret, std::chrono::seconds(seconds));
    return std::make_shared<LuksNode>(config, std::move(file), std::move(unlocked.header),
                                      std::move(unlocked.key), std::move(unlocked.cipher),
                                      discards);
  } catch (Error& e) {
    e.prepend(file && !file->filename().empty() ? file->filename()
                                                : fmt::format("'{}'", config.node_name));
    throw;
  }
}

}  // namespace minivmm::block
