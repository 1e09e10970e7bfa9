// SPDX-License-Identifier: Apache-2.0
// Fuzz target: the input is what a control client sends. Each line that comes back is JSON with an
// answer or an error in it, the connection ends, and what the client sent in pieces is understood
// as in one.
#include <string>
#include <string_view>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/log.h"
#include "base/loop_group.h"
#include "control/qmp/command.h"
#include "control/qmp/message.h"
#include "control/qmp/server.h"
#include "control/qmp/splitter.h"
#include "tests/support/no_target.h"

namespace minivmm::control::qmp {
namespace {

std::vector<std::string> split(std::string_view input, size_t piece) {
  MessageSplitter splitter;
  std::vector<std::string> out;
  while (!input.empty()) {
    const size_t length = std::min(piece, input.size());
    splitter.feed(input.substr(0, length));
    input.remove_prefix(length);
    while (auto message = splitter.next()) out.push_back(message->text + "!" + message->problem);
  }
  return out;
}

void check_answers(std::string_view heard) {
  while (!heard.empty()) {
    const size_t end = heard.find('\n');
    if (end == std::string_view::npos) __builtin_trap();
    const Json line = Json::parse(heard.substr(0, end), nullptr, false);
    if (!line.is_object()) __builtin_trap();
    if (line.contains("QMP") + line.contains("return") + line.contains("error") != 1) {
      __builtin_trap();
    }
    heard.remove_prefix(end + 1);
  }
}

// Answers come while the input goes in, so that both sides fit into the sockets' buffers.
std::string converse(int fd, std::string_view input) {
  std::string heard;
  char piece[16384];
  for (bool open = true; open;) {
    if (!input.empty()) {
      const ssize_t n = ::send(fd, input.data(), std::min<size_t>(input.size(), 4096),
                               MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n > 0) input.remove_prefix(static_cast<size_t>(n));
      if (input.empty()) ::shutdown(fd, SHUT_WR);
    }
    const ssize_t n = ::recv(fd, piece, sizeof piece, input.empty() ? 0 : MSG_DONTWAIT);
    if (n > 0) heard.append(piece, static_cast<size_t>(n));
    open = n > 0 || (n < 0 && !input.empty());
  }
  return heard;
}

struct World {
  World() { base::set_log_level(base::LogLevel::kOff); }
  base::LoopGroup loops{1};
  NoTarget target;  // a client that is allowed to may open any file
  std::shared_ptr<Server> server = std::make_shared<Server>(loops.loop(0), target);
};

}  // namespace
}  // namespace minivmm::control::qmp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace minivmm;
  using namespace minivmm::control::qmp;
  static auto* const world = new World;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  if (split(input, size) != split(input, 7)) __builtin_trap();
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return 0;
  const base::UniqueFd ours(ends[0]);
  world->loops.loop(0).call("serve", [&] { world->server->serve(base::UniqueFd(ends[1])); });
  std::string all = R"({"execute":"qmp_capabilities"})";
  all += input;
  check_answers(converse(ours.get(), all));
  return 0;
}
