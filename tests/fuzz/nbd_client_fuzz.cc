// SPDX-License-Identifier: Apache-2.0
// A hostile server against the client node (driver nbd, with libnbd underneath): the input is a
// program of what it says. Found by it: crashes, sanitizer reports, requests that do not end, and
// reads that say they are done with bytes that no server has sent.
//
// The first byte: bit 0, the handshake is done properly first; bit 1, all requests are made at
// once; bit 2, when the program is used up the server is a good one, for which the client waits
// (otherwise it hangs up); bit 3, the client may make two connections; bit 4, it only reads. Then
// how many requests the client makes, u8 (modulo 9), and of each: kind u8, place u8. Then steps of
// one byte (modulo kSteps) and their operands, integers little-endian; `which` is the request that
// is answered, or from 128 on a cookie of nobody's; `flags` are a chunk's; `bias` i8 is what an
// announced length is off by:
//   0 raw      length u8, bytes
//   1 take     the client's next message, option or request
//   2 answer   type u8, bias, length u8, bytes: to the last option
//   3 info     size u64, flags u16, how u8 (bit 0: with three block sizes u32): INFO and ACK
//   4 context  id u32, name u8: META_CONTEXT and ACK
//   5 enter    flags u16, size u8, how u8: a whole handshake (bits 0, 1 of how: structured
//              replies, contexts; 2: EXPORT_NAME has to do)
//   6 good     count u8: so many requests get what they asked for
//   7 simple   which, error u8, payload u8 (none, right, a byte less, a byte more)
//   8 data     which, flags u8, delta i16, length u16, bias
//   9 hole     which, flags u8, delta i16, length u32
//  10 extents  which, flags u8, id u8, bias, count u8, and of each: length u32, status u8
//  11 error    which, flags u8, type u8, error u8, message length u16, length u8, bytes
//  12 chunk    which, flags u8, type u16, bias, length u8, bytes
//  13 hang up  the next connection goes on with the program
//  14 half     nothing more is sent on this one
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/loop_group.h"
#include "base/sync.h"
#include "block/graph/graph.h"
#include "nbd_client_support.h"

namespace minivmm::nbd {
namespace {

using std::chrono::seconds;
using std::chrono::steady_clock;

constexpr auto kPatience = seconds(30);
constexpr unsigned kMostRequests = 8;

// What the client does. On the loop.
struct Plan {
  bool at_once = false;
  std::string keys{};
  struct Wish {
    uint8_t kind;
    uint8_t place;
  };
  std::vector<Wish> wishes{};
};

// Lives as long as the process.
struct World {
  World() { base::set_log_level(base::LogLevel::kOff); }
  base::LoopGroup loops{1};
  block::Graph graph;
  Listener listener;
  base::UniqueFd finished{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
};

World& world() {
  static auto* const instance = new World;
  return *instance;
}

template <typename Body>
bool succeeds(Body&& body) {
  try {
    body();
    return true;
  } catch (const base::Error&) {
    return false;
  }
}

void read(block::Handle& disk, uint64_t offset, size_t length) {
  std::vector<std::byte> data(length, kNeverSent);
  if (!succeeds([&] { disk.read(offset, base::SingleBuffer(data.data(), data.size())); })) return;
  if (std::find(data.begin(), data.end(), kNeverSent) == data.end()) return;
  std::fprintf(stderr, "a read is done with bytes that nobody sent\n");
  std::abort();
}

void wish(block::Handle& disk, const Plan::Wish& wish) {
  const uint64_t offset = uint64_t{wish.place} * 4096;
  const std::vector<std::byte> data(4096, std::byte{'w'});
  switch (wish.kind % 9) {
    case 0:
      return read(disk, offset, 4096);
    case 1:
      return read(disk, offset, 200 << 10);
    case 2:
      disk.write(offset, base::SingleBuffer(data.data(), data.size()), {.fua = wish.kind >= 128});
      return;
    case 3:
      disk.write_zeroes(offset, 8192, {.may_unmap = wish.kind >= 128});
      return;
    case 4:
      disk.discard(offset, 8192);
      return;
    case 5:
      disk.flush();
      return;
    case 6: {
      const auto status = disk.block_status(offset, 65536);
      if (status.length > 0 && status.length <= 65536) return;
      std::fprintf(stderr, "an extent of %llu bytes\n",
                   static_cast<unsigned long long>(status.length));
      std::abort();
    }
    case 7:
      disk.prefetch(offset, 65536);
      return;
    default:
      // Not aligned: read first, where the server's blocks are larger.
      disk.write(offset + 100, base::SingleBuffer(data.data(), 1000));
  }
}

void converse(const Plan& plan) {
  World& w = world();
  (void)succeeds([&] {
    (void)w.graph.add(block::Options::from_keys(
        "driver=nbd,node-name=remote,uri=nbd+unix:///?socket=" + w.listener.path() + plan.keys));
  });
  (void)succeeds([&] {
    const bool reads = plan.keys.find("read-only") != std::string::npos;
    block::Handle disk = w.graph.attach("remote", "fuzzer", block::Permissions::front_end(!reads));
    base::WaitGroup running;
    for (const Plan::Wish& each : plan.wishes) {
      if (!plan.at_once) {
        (void)succeeds([&] { wish(disk, each); });
        continue;
      }
      running.add();
      base::EventLoop::current()->spawn("wish", [&disk, &running, &each] {
        (void)succeeds([&] { wish(disk, each); });
        running.done();
      });
    }
    running.wait();
    disk.close();
  });
  (void)succeeds([&] { w.graph.remove("remote"); });
}

Plan take_plan(Input& input, uint8_t mode) {
  Plan out;
  out.at_once = (mode & 2) != 0;
  if ((mode & 4) != 0) out.keys += ",reconnect-delay=1";
  out.keys += (mode & 8) != 0 ? ",connections=2" : ",connections=1";
  if ((mode & 16) != 0) out.keys += ",read-only=on";
  const unsigned count = input.take<uint8_t>() % (kMostRequests + 1);
  for (unsigned i = 0; i < count; ++i) {
    const auto kind = input.take<uint8_t>();
    out.wishes.push_back({kind, input.take<uint8_t>()});
  }
  return out;
}

// Until a client comes (true) or the client's fiber has ended.
bool wait_for_client(steady_clock::time_point end) {
  pollfd both[2] = {{world().listener.fd(), POLLIN, 0}, {world().finished.get(), POLLIN, 0}};
  while (::poll(both, 2, 1000) <= 0) {
    if (steady_clock::now() < end) continue;
    std::fprintf(stderr, "the client does not end\n");
    std::abort();
  }
  return (both[1].revents & POLLIN) == 0;
}

}  // namespace
}  // namespace minivmm::nbd

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace minivmm::nbd;
  Input input({data, size});
  const auto mode = input.take<uint8_t>();
  const Plan plan = take_plan(input, mode);
  World& w = world();
  const int finished = w.finished.get();
  const auto end = steady_clock::now() + kPatience;
  w.loops.loop(0).post("client", [&plan, finished] {
    converse(plan);
    (void)::eventfd_write(finished, 1);
  });
  Script script{.input = input, .good_at_last = (mode & 4) != 0};
  bool first = (mode & 1) != 0;
  while (wait_for_client(end)) {
    Conversation talk(w.listener.accept(), finished, script);
    talk.run(std::exchange(first, false));
  }
  eventfd_t count = 0;
  (void)::eventfd_read(finished, &count);
  while (w.listener.accept()) {
  }
  return 0;
}
