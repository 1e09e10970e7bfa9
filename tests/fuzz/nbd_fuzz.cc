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
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "base/log.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "block/filters/filter_node.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/graph.h"
#include "nbd-server/server.h"

namespace minivmm::nbd {
namespace {

constexpr unsigned kSteps = 10;
constexpr unsigned kMaxSteps = 300;
constexpr uint32_t kMaxPayload = 128 << 10;
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
      publish("m", true);
      (void)graph.add(block::Options::from_keys("driver=memory,node-name=c,size=64K"));
      server.add_clone_export("c", graph.attach("c", "fuzzer", block::Permissions::backing()),
                              std::make_shared<CloneMaker>(graph));
    });
  }
  void add(const char* name, const char* keys, bool writable) {
    (void)graph.add(block::Options::from_keys(keys));
    publish(name, writable);
  }
  void publish(const char* name, bool writable) {
    server.add_export(name, graph.attach(name, "fuzzer", block::Permissions::front_end(writable)),
                      {.description = "fuzzed", .writable = writable});
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

class Input {
 public:
  explicit Input(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  template <typename T>
  T take() {
    T value = 0;
    const size_t n = std::min(sizeof value, bytes_.size());
    std::memcpy(&value, bytes_.data(), n);
    bytes_ = bytes_.subspan(n);
    return base::le_to_host(value);
  }
  std::span<const uint8_t> bytes(size_t n) {
    const auto out = bytes_.first(std::min(n, bytes_.size()));
    bytes_ = bytes_.subspan(out.size());
    return out;
  }

 private:
  std::span<const uint8_t> bytes_;
};

// Puts messages together.
class Message {
 public:
  template <typename T>
  Message& number(T value) {
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    base::store_be(bytes_.data() + at, value);
    return *this;
  }
  Message& raw(std::span<const uint8_t> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Message& text(std::string_view text) {
    number(static_cast<uint32_t>(text.size()));
    bytes_.insert(bytes_.end(), text.begin(), text.end());
    return *this;
  }
  Message& fill(size_t n) {
    bytes_.resize(bytes_.size() + n, uint8_t{0xa5});
    return *this;
  }
  Message& option(uint32_t option, const Message& data, int bias = 0) {
    const auto length = static_cast<uint32_t>(static_cast<int64_t>(data.bytes_.size()) + bias);
    return number(uint64_t{0x49484156454f5054}).number(option).number(length).raw(data.bytes_);
  }
  Message& request(uint16_t type, uint16_t flags, uint64_t cookie, uint64_t offset,
                   uint32_t length) {
    number(uint32_t{0x25609513}).number(flags).number(type);
    number(cookie).number(offset).number(length);
    return type == 1 && length <= kMaxPayload ? fill(length) : *this;
  }
  Message& long_request(uint16_t type, uint16_t flags, uint64_t cookie, uint64_t offset,
                        uint64_t length) {
    number(uint32_t{0x21e41c71}).number(flags).number(type);
    return number(cookie).number(offset).number(length);
  }
  std::span<const uint8_t> bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

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

  void run(Input input);

 private:
  void greet(unsigned mode);
  void request(uint16_t type, uint16_t flags, uint64_t offset, uint64_t length);
  void query(Input& input);
  void step(Input& input);
  void name(uint8_t option, uint8_t which);
  void enter(uint8_t which, uint8_t how);
  void send(const Message& message);
  bool drain();
  void finish(bool read_rest);

  base::UniqueFd socket_;
  bool reads_ = true;
  bool open_ = true;
  bool extended_ = false;
  bool greeted_ = false;
  uint64_t cookie_ = 0;
};

void FuzzClient::run(Input input) {
  const auto mode = input.take<uint8_t>();
  reads_ = (mode & 4) == 0;
  if ((mode & 1) != 0) greet(mode);
  for (unsigned n = 0; n < kMaxSteps && !input.empty() && open_; ++n) step(input);
  finish((mode & 8) == 0);
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
  constexpr std::string_view kNames[] = {"d", "r", "m", "c", "c/one", "c/two", "", "nosuch"};
  const std::string_view name = kNames[which % 8];
  Message all;
  if (!greeted_) all.number(uint32_t{3});
  greeted_ = true;
  extended_ = (how & 2) != 0;
  negotiate(all, name, how);
  if ((how & 16) != 0) negotiate(all, kNames[(which + 1) % 8], how);
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

void FuzzClient::step(Input& input) {
  Message message;
  switch (input.take<uint8_t>() % kSteps) {
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
  for (unsigned n = 0; world().has_clients(); ++n) {
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr, "a session did not end\n");
      std::abort();
    }
    if (n > 20) ::usleep(50);
  }
}

}  // namespace
}  // namespace minivmm::nbd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  minivmm::nbd::FuzzClient client;
  client.run(minivmm::nbd::Input({data, size}));
  return 0;
}
