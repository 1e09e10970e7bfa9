// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is the beginning of a LUKS image. Its header is parsed, checked, tried
// with a password under a small limit of time; where it opens it is read, written and amended.
// Whatever it says, that ends in an error or in success.
#include <string_view>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "base/loop_group.h"
#include "block/crypto/luks1_amend.h"
#include "block/crypto/luks1_unlock.h"
#include "block/crypto/secret.h"
#include "block/crypto/unlocked_luks.h"
#include "block/formats/luks/luks_node.h"
#include "block/protocols/memory.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kRoom = 64 << 10;
constexpr std::chrono::milliseconds kLimit{5};
constexpr std::string_view kPassword = "fuzz";

template <typename Body>
void ignore_errors(Body&& body) {
  try {
    body();
  } catch (const base::Error&) {
  }
}

std::span<const std::byte> password() {
  return std::as_bytes(std::span(kPassword.data(), kPassword.size()));
}

std::shared_ptr<Node> make_file(std::span<const std::byte> image) {
  auto file = std::make_shared<MemoryNode>(NodeConfig{"file", false}, image.size() + kRoom);
  Edge edge(file, "fuzz", Permissions::format_file(true));
  edge.write(0, base::SingleBuffer(image));
  return file;
}

// A header that was accepted says the same when it is written and parsed again.
void check_round_trip(const crypto::Luks1Header& header) {
  const crypto::Luks1Bytes bytes = crypto::encode_luks1(header);
  const crypto::Luks1Header again = crypto::parse_luks1(bytes);
  if (crypto::encode_luks1(again) != bytes) __builtin_trap();
}

void use_disk(const std::shared_ptr<Node>& file, std::unique_ptr<crypto::UnlockedLuks> luks) {
  const auto node =
      std::make_shared<LuksNode>(NodeConfig{"disk", false}, file, std::move(luks), true);
  {
    Edge disk(node, "guest", Permissions::front_end(true));
    std::vector<std::byte> buffer(std::min<uint64_t>(disk.size(), 4096));
    if (!buffer.empty()) {
      ignore_errors([&] { disk.read(0, base::SingleBuffer(std::span(buffer))); });
      ignore_errors([&] { disk.write(0, base::SingleBuffer(std::span(buffer))); });
      ignore_errors([&] { disk.discard(0, buffer.size()); });
    }
    crypto::Luks1AmendOptions add;
    add.activate = true;
    add.new_secret = "fuzz";
    add.iter_time = std::chrono::milliseconds(1);
    ignore_errors([&] { node->amend(add); });
    crypto::Luks1AmendOptions erase;
    erase.keyslot = 0;
    ignore_errors([&] { node->amend(erase); });
  }
  node->close();
}

void use_image(std::span<const std::byte> image) {
  const auto file = make_file(image);
  ignore_errors([&] {
    Edge edge(file, "fuzz", {0, Permissions::kWrite | Permissions::kResize});
    crypto::LuksArea area(edge, 0, edge.size());
    ignore_errors([&] { crypto::read_luks1(area, false); });  // as within qcow2
    const crypto::Luks1Header header = crypto::read_luks1(area, true);
    check_round_trip(header);
    (void)luks_facts(header);
    const crypto::UnlockOptions options{.key_secret = "fuzz", .limit = kLimit};
    use_disk(file, std::make_unique<crypto::UnlockedLuks>(area, true, options, ""));
  });
}

}  // namespace
}  // namespace minivmm::block

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace minivmm;
  base::set_log_level(base::LogLevel::kOff);
  static base::LoopGroup loops(1);
  static const bool prepared = [] {
    block::crypto::secrets().add("fuzz", block::crypto::SecureBytes(block::password()));
    return true;
  }();
  (void)prepared;
  if (size == 0 || size > 1 << 20) return 0;
  // SAFETY: octets as bytes.
  const std::span image(reinterpret_cast<const std::byte*>(data), size);
  loops.loop(0).call("fuzz", [&] { block::use_image(image); });
  return 0;
}
