// SPDX-License-Identifier: Apache-2.0
// A hostile client against the NBD server: the input is a program of what it says. Found by it:
// crashes, sanitizer reports, and sessions that do not end within seconds of the client's leaving.
//
// The first byte: bit 0, the handshake is done properly first (structured replies, base:allocation,
// GO of the writable export); bit 1, of the read-only one instead; bit 2, the client never reads;
// bit 3, it leaves without reading what is left; bit 4, extended headers; bit 5, simple replies;
// bit 6, EXPORT_NAME; bit 7, all contexts. Then steps of one byte (modulo kSteps) and their
// operands, integers little-endian:
//   0 raw      length u8, bytes
//   1 option   option u8, data length u8, bytes; the announced length is that plus bias u8 (signed)
//   2 request  type u8, flags u16, offset u32, length u32; a WRITE (with extended headers: what has
//              PAYLOAD_LEN) brings its payload if that is at most 128 KiB
//   3 read     takes what the server has sent so far
//   4 adjacent type u8 (READ or WRITE), count u8, offset u32: so many of 512 bytes in a row
//   5 name     option u8, export u8: INFO, GO or EXPORT_NAME and contexts with a proper name
//   6 query    flags u16, offset u32, length u64, count u8, ids u8: a BLOCK_STATUS that names
//            contexts
//   7 long     type u8, flags u16, offset u64, length u64: as request, with extended headers
//   8 enter    export u8, how u8: a whole handshake (bits 0, 1 of how: structured replies, extended
//              headers; 2: every context there is, dirty bitmaps too; 3: they are listed before;
//              4: twice, the second time for the next export; 5: EXPORT_NAME; 6: not entered)
//   9 starttls data length u8, bytes: this server has no TLS
//  10 other    the steps that follow are those of the other one of two connections
//  11 withdraw export u8 (of the first three): it is taken away from its clients, and comes again
#include <poll.h>
#include <string_view>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "block/filters/filter_node.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/graph.h"
#include "nbd-server/server.h"
#include "nbd_message.h"

namespace minivmm::nbd {
namespace {

constexpr unsigned kSteps = 12;
constexpr unsigned kMaxSteps = 300;
constexpr auto kPatience = std::chrono::seconds(10);

// Two dirty bitmaps of which every other 512 bytes are dirty, and one that is of no use.
class Bitmaps final : public block::DirtyBitmaps {
 public:
  std::vector<Info> list() const override {
    return {{"a", 512, true, false}, {"b", 512, false, false}, {"bad", 512, true, true}};
  }
  Status status(std::string_view, uint64_t offset, uint64_t length) override {
    return {std::min(length, 512 - offset % 512), offset / 512 % 2 == 1};
  }
  void add(std::string_view, uint64_t, bool) override {}
  void remove(std::string_view) override {}
  void clear(std::string_view) override {}
  void set_enabled(std::string_view, bool) override {}
  void merge(std::string_view, DirtyBitmaps&, std::string_view) override {}
};

class BitmapNode final : public block::FilterNode {
 public:
  BitmapNode(const block::NodeConfig& config, std::shared_ptr<block::Node> file)
      : FilterNode(config, "bitmaps", std::move(file)) {}
  block::DirtyBitmaps* dirty_bitmaps() noexcept override { return &bitmaps_; }

 private:
  Bitmaps bitmaps_;
};

// Disks in memory; every eighth cannot be made.
class CloneMaker final : public CloneSource {
 public:
  explicit CloneMaker(block::Graph& graph) : graph_(graph) {}
  block::Handle open(const std::string&) override {
    const unsigned number = next_++;
    if (number % 8 == 7) throw base::Error(ENOSPC, "no clone");
    const std::string name = "clone" + std::to_string(number);
    (void)graph_.add(block::Options::from_keys("driver=memory,size=64K,node-name=" + name));
    return graph_.attach(name, "fuzzer", block::Permissions::front_end(true));
  }
  void close(block::Handle disk, const std::string&) override {
    const std::string name = disk.node_name();
    disk.close();
    graph_.remove(name);
  }

 private:
  block::Graph& graph_;
  std::atomic<unsigned> next_{0};
};

// Lives as long as the process: one server, many sessions.
struct World {
  World() {
    base::set_log_level(base::LogLevel::kOff);
    loops.loop(0).call("open", [this] {
      add("d", "driver=memory,node-name=d,size=1M", true);
      add("r",
          "driver=fault,op=read,offset=65536,length=4096,errno=EIO,node-name=r,"
          "file.driver=memory,file.size=1M",
          false);
      graph.adopt(std::make_shared<BitmapNode>(
          block::NodeConfig{"m", false},
          graph.add(block::Options::from_keys("driver=memory,node-name=m.file,size=1M"))));
      publish("m",
              {.description = "marked", .writable = true, .contexts = {{"qemu:dirty-bitmap:b"}}});
      (void)graph.add(block::Options::from_keys("driver=memory,node-name=h,size=64K"));
      publish("h", {.description = "hers", .writable = true, .allow = {"alice"}});
      (void)graph.add(block::Options::from_keys("driver=memory,node-name=o,size=64K"));
      publish("o", {.description = "one", .writable = true, .max_connections = 1});
      (void)graph.add(block::Options::from_keys("driver=memory,node-name=c,size=64K"));
      server.add_clone_export("c", graph.attach("c", "fuzzer", block::Permissions::backing()),
                              std::make_shared<CloneMaker>(graph));
    });
  }
  void add(const char* name, const char* keys, bool writable) {
    (void)graph.add(block::Options::from_keys(keys));
    publish(name, {.description = "fuzzed", .writable = writable});
  }
  void publish(const char* name, ExportOptions options) {
    auto handle = graph.attach(name, "fuzzer", block::Permissions::front_end(options.writable));
    server.add_export(name, std::move(handle), std::move(options));
  }
  // On the fuzzer's thread. It is there again when this returns.
  void withdraw(unsigned which) {
    constexpr const char* kNames[] = {"d", "r", "o"};
    const char* const name = kNames[which % 3];
    loops.loop(0).call("withdraw", [&] {
      // Where requests of its clients run still the handle closes with the last of them.
      ignore_errors(
          [&] { server.remove_export(name, base::Clock::now() + std::chrono::milliseconds(5)); });
      ignore_errors([&] {
        publish(name, {.description = "fuzzed",
                       .writable = which % 3 != 1,
                       .max_connections = which % 3 == 2 ? 1u : 0u});
      });
    });
  }
  template <typename Body>
  static void ignore_errors(Body&& body) {
    try {
      body();
    } catch (const base::Error&) {
    }
  }
  bool has_clients() const {
    const auto lines = server.describe();
    return std::any_of(lines.begin(), lines.end(),
                       [](const auto& line) { return line.starts_with("NBD client"); });
  }

  base::LoopGroup loops{1};
  block::Graph graph;
  Server server{loops, {.handshake_limit = std::chrono::seconds(5)}};
};

World& world() {
  static auto* const instance = new World;
  return *instance;
}

class FuzzClient {
 public:
  FuzzClient() {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
      std::abort();
    }
    world().server.serve(base::UniqueFd(pair[0]));
    socket_.reset(pair[1]);
  }

  void begin(uint8_t mode);
  void step(uint8_t what, Input& input);
  bool open() const { return open_; }
  void finish(bool read_rest);

 private:
  void greet(unsigned mode);
  void request(uint16_t type, uint16_t flags, uint64_t offset, uint64_t length);
  void query(Input& input);
  void name(uint8_t option, uint8_t which);
  void enter(uint8_t which, uint8_t how);
  void send(const Message& message);
  bool drain();

  base::UniqueFd socket_;
  bool reads_ = true;
  bool open_ = true;
  bool extended_ = false;
  bool greeted_ = false;
  uint64_t cookie_ = 0;
};

void FuzzClient::begin(uint8_t mode) {
  reads_ = (mode & 4) == 0;
  if ((mode & 1) != 0) greet(mode);
}

void FuzzClient::greet(unsigned mode) {
  const std::string_view name = (mode & 2) != 0 ? "r" : "d";
  Message contexts;
  contexts.text(name);
  if ((mode & 128) != 0) {
    contexts.number(uint32_t{2}).text("base:allocation").text("qemu:allocation-depth");
  } else {
    contexts.number(uint32_t{1}).text("base:allocation");
  }
  extended_ = (mode & 16) != 0;
  greeted_ = true;
  Message all;
  all.number(uint32_t{3});
  if (extended_) {
    all.option(11, Message());
  } else if ((mode & 32) == 0) {
    all.option(8, Message());
  }
  all.option(10, contexts);
  Message data;
  if ((mode & 64) != 0) {
    data.raw({reinterpret_cast<const uint8_t*>(name.data()), name.size()});
    all.option(1, data);
  } else {
    data.text(name).number(uint16_t{1}).number(uint16_t{3});
    all.option(7, data);
  }
  send(all);
}

void FuzzClient::request(uint16_t type, uint16_t flags, uint64_t offset, uint64_t length) {
  constexpr uint16_t kPayloadLen = 32;
  Message message;
  if (extended_) {
    message.long_request(type, flags, ++cookie_, offset, length);
    if ((flags & kPayloadLen) != 0 && length <= kMaxPayload) message.fill(length);
  } else {
    message.request(type, flags, ++cookie_, offset, static_cast<uint32_t>(length));
  }
  send(message);
}

// With the ids that exist and others, and a length that may say something else.
void FuzzClient::query(Input& input) {
  const auto flags = input.take<uint16_t>();
  const auto offset = input.take<uint32_t>();
  const auto length = input.take<uint64_t>();
  const unsigned count = input.take<uint8_t>() % 40;
  Message message;
  message.long_request(7, flags | 32, ++cookie_, offset, 8 + 4 * uint64_t{count});
  message.number(length);
  for (unsigned i = 0; i < count; ++i) message.number(uint32_t{input.take<uint8_t>()} % 5);
  send(message);
}

// Options of one handshake for an export, but for the one that ends it.
void negotiate(Message& all, std::string_view name, uint8_t how) {
  if ((how & 1) != 0) all.option(8, Message());
  if ((how & 2) != 0) all.option(11, Message());
  Message contexts;
  contexts.text(name);
  if ((how & 4) != 0) {
    contexts.number(uint32_t{4}).text("base:allocation").text("qemu:allocation-depth");
    contexts.text("qemu:dirty-bitmap:a").text("qemu:dirty-bitmap:b");
  } else {
    contexts.number(uint32_t{2}).text("qemu:").text("base:allocation");
  }
  if ((how & 8) != 0) all.option(9, contexts);
  all.option(10, contexts);
}

void FuzzClient::enter(uint8_t which, uint8_t how) {
  constexpr std::string_view kNames[] = {"d",     "r", "m",      "c", "c/one",
                                         "c/two", "",  "nosuch", "h", "o"};
  constexpr unsigned kCount = std::size(kNames);
  const std::string_view name = kNames[which % kCount];
  Message all;
  if (!greeted_) all.number(uint32_t{3});
  greeted_ = true;
  extended_ = (how & 2) != 0;
  negotiate(all, name, how);
  if ((how & 16) != 0) negotiate(all, kNames[(which + 1) % kCount], how);
  Message data;
  if ((how & 32) != 0) {
    data.raw({reinterpret_cast<const uint8_t*>(name.data()), name.size()});
    all.option(1, data);
  } else {
    data.text(name).number(uint16_t{3}).number(uint16_t{1}).number(uint16_t{2}).number(uint16_t{3});
    all.option((how & 64) != 0 ? 6 : 7, data);
  }
  send(all);
}

void FuzzClient::name(uint8_t option, uint8_t which) {
  const char* const names[] = {"d", "r", "", "nosuch"};
  const std::string_view name = names[which % 4];
  Message data;
  Message all;
  switch (option % 4) {
    case 0:
      data.raw({reinterpret_cast<const uint8_t*>(name.data()), name.size()});
      send(all.option(1, data));
      break;
    case 1:
    case 2:
      data.text(name).number(uint16_t{2}).number(uint16_t{2}).number(uint16_t{3});
      send(all.option(5u + option % 4, data));
      break;
    default:
      data.text(name).number(uint32_t{2}).text("base:").text("base:allocation");
      send(all.option(9u + which / 4 % 2, data));
  }
}

void FuzzClient::step(uint8_t what, Input& input) {
  Message message;
  switch (what) {
    case 0:
      send(message.raw(input.bytes(input.take<uint8_t>())));
      break;
    case 1: {
      const auto option = input.take<uint8_t>();
      Message data;
      data.raw(input.bytes(input.take<uint8_t>()));
      send(message.option(option, data, static_cast<int8_t>(input.take<uint8_t>())));
      break;
    }
    case 2: {
      const auto type = input.take<uint8_t>();
      const auto flags = input.take<uint16_t>();
      const auto offset = input.take<uint32_t>();
      request(type, flags, offset, input.take<uint32_t>());
      break;
    }
    case 3:
      (void)drain();
      break;
    case 4: {
      const uint16_t type = input.take<uint8_t>() % 2;
      const unsigned count = input.take<uint8_t>();
      uint64_t offset = input.take<uint32_t>() % (1 << 20);
      for (unsigned i = 0; i < count; ++i, offset += 512) {
        if (extended_) {
          message.long_request(type, type == 1 ? 32 : 0, ++cookie_, offset, 512);
          if (type == 1) message.fill(512);
        } else {
          message.request(type, 0, ++cookie_, offset, 512);
        }
      }
      send(message);
      break;
    }
    case 5: {
      const auto option = input.take<uint8_t>();
      name(option, input.take<uint8_t>());
      break;
    }
    case 6:
      query(input);
      break;
    case 8: {
      const auto which = input.take<uint8_t>();
      enter(which, input.take<uint8_t>());
      break;
    }
    case 9: {
      Message data;
      data.raw(input.bytes(input.take<uint8_t>()));
      send(message.option(5, data));
      break;
    }
    default: {
      const auto type = input.take<uint8_t>();
      const auto flags = input.take<uint16_t>();
      const auto offset = input.take<uint64_t>();
      request(type, flags, offset, input.take<uint64_t>());
    }
  }
}

// Sends all of it unless the server has closed; reads meanwhile, unless this client never does:
// then what does not fit is not sent.
void FuzzClient::send(const Message& message) {
  auto left = message.bytes();
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!left.empty() && open_) {
    const ssize_t n = ::send(socket_.get(), left.data(), left.size(), MSG_NOSIGNAL);
    if (n >= 0) {
      left = left.subspan(static_cast<size_t>(n));
      continue;
    }
    if (errno != EAGAIN) open_ = false;
    if (!open_ || !reads_) return;
    (void)drain();
    pollfd p{socket_.get(), POLLIN | POLLOUT, 0};
    (void)::poll(&p, 1, 100);
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr, "the server neither takes requests nor closes\n");
      std::abort();
    }
  }
}

// False: the server has closed.
bool FuzzClient::drain() {
  static std::array<std::byte, 256 << 10> sink;
  for (;;) {
    const ssize_t n = ::recv(socket_.get(), sink.data(), sink.size(), 0);
    if (n > 0) continue;
    if (n < 0 && errno == EAGAIN) return true;
    open_ = false;
    return false;
  }
}

// However the client leaves, its session ends soon.
void FuzzClient::finish(bool read_rest) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  if (read_rest && reads_) {
    ::shutdown(socket_.get(), SHUT_WR);
    while (drain() && std::chrono::steady_clock::now() < end) {
      pollfd p{socket_.get(), POLLIN, 0};
      (void)::poll(&p, 1, 100);
    }
  }
  socket_.reset();
}

void wait_for_sessions() {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  for (unsigned n = 0; world().has_clients(); ++n) {
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr, "a session did not end\n");
      std::abort();
    }
    if (n > 20) ::usleep(50);
  }
}

void run(Input input) {
  constexpr uint8_t kOther = 10, kWithdraw = 11;
  const auto mode = input.take<uint8_t>();
  std::unique_ptr<FuzzClient> clients[2];
  unsigned now = 0;
  for (unsigned n = 0; n < kMaxSteps && !input.empty(); ++n) {
    if (!clients[now]) {
      clients[now] = std::make_unique<FuzzClient>();
      clients[now]->begin(mode);
    }
    const auto what = static_cast<uint8_t>(input.take<uint8_t>() % kSteps);
    if (what == kOther) {
      now = 1 - now;
    } else if (what == kWithdraw) {
      world().withdraw(input.take<uint8_t>());
    } else if (clients[now]->open()) {
      clients[now]->step(what, input);
    } else {
      break;
    }
  }
  for (auto& each : clients) {
    if (each) each->finish((mode & 8) == 0);
  }
  wait_for_sessions();
}

}  // namespace
}  // namespace minivmm::nbd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  minivmm::nbd::run(minivmm::nbd::Input({data, size}));
  return 0;
}
