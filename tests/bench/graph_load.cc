// SPDX-License-Identifier: Apache-2.0
// Random reads of a file through one event loop and the block graph, with no front end: what the
// runtime itself costs. The one tool here that links the code it measures.
#include <string>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <vector>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/event_loop.h"
#include "base/loop_group.h"
#include "base/sync.h"
#include "block/graph/graph.h"
#include "tests/bench/args.h"
#include "tests/bench/histogram.h"

namespace minivmm::bench {
namespace {

using Clock = std::chrono::steady_clock;

struct Load {
  block::Handle& disk;
  const uint64_t block_size;
  const Clock::time_point begin;  // of what counts
  const Clock::time_point end;
  Histogram latency;
  uint64_t errors = 0;
};

void reader(Load& load, uint64_t seed) {
  std::mt19937_64 random(seed);
  base::Buffer buffer(load.block_size);
  const uint64_t blocks = load.disk.size() / load.block_size;
  auto started = Clock::now();
  while (started < load.end) {
    try {
      load.disk.read(random() % blocks * load.block_size, buffer.io());
    } catch (const std::exception&) {
      ++load.errors;
    }
    const auto now = Clock::now();
    if (started >= load.begin) {
      load.latency.add(static_cast<uint64_t>((now - started).count()));
    }
    started = now;
    // A request that the page cache answered did not suspend: the others' turn.
    base::EventLoop::current()->yield();
  }
}

int run(const Args& args) {
  const std::string path = args.positional().at(0);
  const double seconds = args.real("seconds", 2);
  const double ramp = args.real("ramp", 0.15);
  const uint64_t depth = args.number("depth", 32);
  base::LoopGroup loops(1);
  block::Graph graph;
  loops.loop(0).call("load", [&] {
    block::Options options;
    options.set("driver", "raw");
    options.set("node-name", "disk");
    options.set("read-only", "on");
    options.set("file.driver", "file");
    options.set("file.filename", path);
    options.set("file.locking", "off");
    if (args.has("direct")) options.set("file.cache.direct", "on");
    graph.add(options);
    block::Handle disk =
        graph.attach("disk", "load", block::Permissions::front_end(/*writable=*/false));
    const auto begin = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                          std::chrono::duration<double>(ramp));
    Load load{
        disk,
        args.number("bs", 4096),
        begin,
        begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)),
        {},
        0};
    base::WaitGroup group;
    group.add(depth);
    for (uint64_t i = 0; i < depth; ++i) {
      loops.loop(0).spawn("reader", [&, i] {
        reader(load, args.number("seed", 1) * 1000 + i);
        group.done();
      });
    }
    group.wait();
    disk.close();
    graph.close();
    const double iops = static_cast<double>(load.latency.count()) / seconds;
    fmt::print(
        "{{\"iops\": {:.0f}, \"mb_per_s\": {:.1f}, \"latency_us\": {{\"mean\": {:.2f}, \"p50\": "
        "{:.2f}, \"p99\": {:.2f}}}, \"requests\": {}, \"errors\": {}, \"seconds\": {}, "
        "\"client_cpu_seconds\": 0}}\n",
        iops, iops * static_cast<double>(load.block_size) / 1e6, load.latency.mean() / 1e3,
        static_cast<double>(load.latency.quantile(0.5)) / 1e3,
        static_cast<double>(load.latency.quantile(0.99)) / 1e3, load.latency.count(), load.errors,
        seconds);
  });
  return 0;
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  try {
    const minivmm::bench::Args args(argc, argv,
                                    {"rw", "bs", "depth", "seconds", "ramp", "seed", "direct"});
    if (args.positional().size() != 1) {
      std::fputs("Usage: graph_load FILE [--bs=4096] [--depth=32] [--seconds=2] [--direct]\n",
                 stderr);
      return 1;
    }
    return minivmm::bench::run(args);
  } catch (const std::exception& e) {
    fmt::print(stderr, "graph_load: {}\n", e.what());
    return 1;
  }
}
