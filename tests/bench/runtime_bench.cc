// SPDX-License-Identifier: Apache-2.0
// What the runtime's primitives cost: Google Benchmark, one thread unless the name says more.
#include <atomic>

#include <benchmark/benchmark.h>

#include "base/epoch.h"
#include "base/event_loop.h"
#include "base/loop_group.h"
#include "base/sync.h"

namespace minivmm::base {
namespace {

// There and back: one suspension and one resumption through the ready list.
void FiberRoundTrip(benchmark::State& state) {
  LoopGroup loops(1);
  loops.loop(0).call("bench", [&] {
    for (auto _ : state) EventLoop::current()->yield();
  });
}
BENCHMARK(FiberRoundTrip);

// A fiber made, run to its end in place, and freed.
void SpawnNow(benchmark::State& state) {
  LoopGroup loops(1);
  loops.loop(0).call("bench", [&] {
    int ran = 0;
    for (auto _ : state) EventLoop::current()->spawn_now("empty", [&ran] { ++ran; });
    benchmark::DoNotOptimize(ran);
  });
}
BENCHMARK(SpawnNow);

void UncontendedMutex(benchmark::State& state) {
  LoopGroup loops(1);
  loops.loop(0).call("bench", [&] {
    FiberMutex mutex;
    for (auto _ : state) {
      mutex.lock();
      mutex.unlock();
    }
  });
}
BENCHMARK(UncontendedMutex);

void EpochPin(benchmark::State& state) {
  LoopGroup loops(1);
  loops.loop(0).call("bench", [&] {
    Epoch epoch;
    for (auto _ : state) const Epoch::Pin pin(epoch);
  });
}
BENCHMARK(EpochPin);

// To another loop and back, one at a time: dominated by waking a thread, or by finding it awake.
void CrossLoopPost(benchmark::State& state) {
  LoopGroup loops(2);
  loops.loop(0).call("bench", [&] {
    for (auto _ : state) {
      Event answered;
      loops.loop(1).post("echo", [&answered] { answered.set(); });
      answered.wait();
    }
  });
}
BENCHMARK(CrossLoopPost)->UseRealTime();

// Many posts under way at once: what each costs when nobody sleeps.
void CrossLoopPostsOf64(benchmark::State& state) {
  LoopGroup loops(2);
  loops.loop(0).call("bench", [&] {
    for (auto _ : state) {
      WaitGroup group;
      group.add(64);
      for (int i = 0; i < 64; ++i) loops.loop(1).post("echo", [&group] { group.done(); });
      group.wait();
    }
  });
  state.SetItemsProcessed(state.iterations() * 64);
}
BENCHMARK(CrossLoopPostsOf64)->UseRealTime();

}  // namespace
}  // namespace minivmm::base

BENCHMARK_MAIN();
