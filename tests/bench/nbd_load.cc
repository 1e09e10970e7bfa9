// SPDX-License-Identifier: Apache-2.0
// nbd_load: loads an NBD server with many requests in flight and few system calls of its own, and
// prints what it measured as one JSON object. Exit status 1: an error reply, wrong content or a
// failed connection.
#include <csignal>
#include <cstdio>
#include <exception>
#include <future>
#include <vector>

#include "args.h"
#include "base/error.h"
#include "load_thread.h"

namespace minivmm::bench {
namespace {

constexpr const char* kUsage =
    "usage: nbd_load URI [--rw=randread|randwrite|randrw|read|write] [--bs=4096] [--depth=1]\n"
    "    [--connections=1] [--threads=1] [--seconds=1] [--ramp=0.1] [--range=BYTES] [--seed=1]\n"
    "    [--structured] [--spin] [--verify]\n"
    "URI: nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME. --verify writes blocks of known\n"
    "content, checks each read of them and reads all of them again at the end. --spin polls the\n"
    "sockets without sleeping.\n";

LoadOptions options_of(const Args& args) {
  LoadOptions o;
  if (args.positional().size() != 1) throw base::Error(EINVAL, "give one URI");
  o.address = parse_nbd_uri(args.positional().front());
  o.kind = parse_load_kind(args.text("rw", "randread"));
  o.block_size = args.number("bs", o.block_size);
  o.depth = static_cast<unsigned>(args.number("depth", o.depth));
  o.connections = static_cast<unsigned>(args.number("connections", o.connections));
  o.threads = static_cast<unsigned>(args.number("threads", o.threads));
  o.seconds = args.real("seconds", o.seconds);
  o.ramp = args.real("ramp", o.ramp);
  o.range = args.number("range", 0);
  o.seed = args.number("seed", o.seed);
  o.verify = args.has("verify");
  o.structured = args.has("structured");
  o.spin = args.has("spin");
  constexpr std::size_t kMaxBlock = 4 << 20;
  if (o.block_size < 512 || o.block_size > kMaxBlock || o.block_size % 512 != 0 || o.depth == 0 ||
      o.depth > 1024 || o.threads == 0 || o.threads > 64) {
    throw base::Error(EINVAL, "--bs is 512 to 4M, --depth 1 to 1024, --threads 1 to 64");
  }
  return o;
}

void print(const LoadOptions& o, const LoadResult& r) {
  const Histogram& h = r.stats.latency;
  const double iops = static_cast<double>(h.count()) / r.seconds;
  const auto us = [](double ns) { return ns / 1000; };
  std::printf(
      "{\"iops\": %.1f, \"mb_per_s\": %.2f, \"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, "
      "\"p99\": %.2f, \"max\": %.2f}, \"requests\": %llu, \"errors\": %llu, \"mismatches\": %llu, "
      "\"sends\": %llu, \"receives\": %llu, \"seconds\": %.3f, \"client_cpu_seconds\": %.3f}\n",
      iops, iops * static_cast<double>(o.block_size) / 1e6, us(h.mean()),
      us(static_cast<double>(h.quantile(0.5))), us(static_cast<double>(h.quantile(0.99))),
      us(static_cast<double>(h.max())), static_cast<unsigned long long>(h.count()),
      static_cast<unsigned long long>(r.stats.errors),
      static_cast<unsigned long long>(r.mismatches), static_cast<unsigned long long>(r.stats.sends),
      static_cast<unsigned long long>(r.stats.receives), r.seconds, r.cpu_seconds);
}

LoadResult load(const LoadOptions& options) {
  std::vector<std::unique_ptr<LoadThread>> threads;
  for (unsigned i = 0; i < options.threads; ++i) {
    threads.push_back(std::make_unique<LoadThread>(options, i));
  }
  std::vector<std::future<LoadResult>> others;
  for (unsigned i = 1; i < options.threads; ++i) {
    others.push_back(std::async(std::launch::async, [&t = *threads[i]] { return t.run(); }));
  }
  LoadResult sum = threads[0]->run();
  for (auto& other : others) {
    const LoadResult r = other.get();
    sum.stats.latency.merge(r.stats.latency);
    sum.stats.errors += r.stats.errors;
    sum.stats.sends += r.stats.sends;
    sum.stats.receives += r.stats.receives;
    sum.mismatches += r.mismatches;
    sum.cpu_seconds += r.cpu_seconds;
  }
  return sum;
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  using namespace minivmm::bench;
  std::signal(SIGPIPE, SIG_IGN);
  try {
    const Args args(argc, argv,
                    {"rw", "bs", "depth", "connections", "threads", "seconds", "ramp", "range",
                     "seed", "verify", "structured", "spin", "help"});
    if (args.has("help")) {
      std::fputs(kUsage, stderr);
      return 2;
    }
    const LoadOptions options = options_of(args);
    const LoadResult result = load(options);
    print(options, result);
    return result.stats.errors == 0 && result.mismatches == 0 ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "nbd_load: %s\n", e.what());
    return 1;
  }
}
