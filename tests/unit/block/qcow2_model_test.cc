// SPDX-License-Identifier: Apache-2.0
// The driver against a plain byte array: random requests from fibers on two loops, over a grid of
// formats. Afterwards the content is right, our check and QEMU's find nothing, and QEMU reads the
// same content.
#include <atomic>
#include <cstring>
#include <mutex>

#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "qcow2_fixture.h"

namespace minivmm::block {
namespace {

struct Format {
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  bool backing;
  bool extended_l2 = false;
};

std::string name_of(const testing::TestParamInfo<Format>& info) {
  const Format& f = info.param;
  return fmt::format("v{}_cluster{}_refcount{}{}{}", f.version, 1U << f.cluster_bits,
                     1U << f.refcount_order, f.backing ? "_backing" : "",
                     f.extended_l2 ? "_extended" : "");
}

class Qcow2Model : public Qcow2Test, public testing::WithParamInterface<Format> {
 protected:
  // Each fiber has a stripe of the disk of its own, so that the model is exact; stripes share
  // clusters at their borders, L2 tables and everything else.
  static constexpr unsigned kFibers = 8;

  void SetUp() override {
    const Format& f = GetParam();
    size_ = f.cluster_bits >= 20 ? 40 << 20 : 6 << 20;
    size_ -= 512 * 5;  // the last cluster is short
    model_.resize(size_);
    if (f.backing) {
      const auto base = pattern_bytes(size_ / 2 + 777, 99);
      std::ofstream(path("base.raw"), std::ios::binary)
          .write(reinterpret_cast<const char*>(base.data()),
                 static_cast<std::streamsize>(base.size()));
      std::memcpy(model_.data(), base.data(), base.size());
    }
    qcow2::CreateOptions options{.size = size_,
                                 .version = f.version,
                                 .cluster_bits = f.cluster_bits,
                                 .refcount_order = f.refcount_order,
                                 .extended_l2 = f.extended_l2};
    if (f.backing) {
      options.backing_file = "base.raw";
      options.backing_format = "raw";
    }
    create("disk.qcow2", options);
  }

  static int steps() { return GetParam().cluster_bits >= 20 ? 20 : 120; }

  void step(Handle& disk, std::mt19937_64& random, uint64_t begin, uint64_t end) {
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    uint64_t offset = begin + random() % (end - begin);
    uint64_t most = std::min<uint64_t>(end - offset, 3 * cluster + 700);
    uint64_t length = 1 + random() % most;
    if (random() % 2 == 0) {  // often whole clusters
      offset = std::min(std::max(offset / cluster * cluster, begin), end - 1);
      most = end - offset;
      length = std::min(most, (1 + random() % 4) * cluster);
    }
    const auto kind = static_cast<unsigned>(random() % 10);
    if (kind < 5) {
      const auto data = pattern_bytes(length, random());
      std::memcpy(model_.data() + offset, data.data(), length);
      disk.write(offset, base::SingleBuffer(std::span(data)), {.fua = random() % 16 == 0});
    } else if (kind < 7) {
      disk.write_zeroes(offset, length, {.may_unmap = random() % 2 == 0});
      std::memset(model_.data() + offset, 0, length);
    } else if (kind == 7) {
      disk.discard(offset, length);
      forget_discarded(offset, length);
    } else {
      ASSERT_EQ(
          std::memcmp(read_bytes(disk, offset, length).data(), model_.data() + offset, length), 0)
          << "at " << offset << " + " << length;
    }
    if (random() % 64 == 0) disk.flush();
  }

  // As the driver's header promises: whole clusters become zero, the rest stays.
  void forget_discarded(uint64_t offset, uint64_t length) {
    if (GetParam().version < 3 && GetParam().backing) return;
    const uint64_t cluster = uint64_t{1} << GetParam().cluster_bits;
    const uint64_t first = (offset + cluster - 1) / cluster * cluster;
    const uint64_t end = offset + length == size_ ? size_ : (offset + length) / cluster * cluster;
    if (first < end) std::memset(model_.data() + first, 0, end - first);
  }

  void expect_content(Handle& disk) {
    const auto all = read_bytes(disk, 0, size_);
    for (uint64_t i = 0; i < size_; ++i) {
      if (all[i] != model_[i]) FAIL() << "the first difference is at " << i;
    }
  }

  void expect_sound(bool leaks_allowed) {
    on_fiber([&] {
      graph_.add(Options::from_keys("driver=file,node-name=checked,read-only=on,filename=" +
                                    path("disk.qcow2")));
      {
        Edge edge(graph_.find("checked"), "check", {});
        std::string lines;
        const auto result =
            qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
        EXPECT_EQ(result.corruptions, 0U) << lines;
        EXPECT_EQ(result.check_errors, 0U) << lines;
        EXPECT_TRUE(leaks_allowed || result.leaks == 0) << lines;
      }
      graph_.remove("checked");
    });
  }

  uint64_t size_ = 0;
  std::vector<std::byte> model_;
};

TEST_P(Qcow2Model, RandomRequestsMatchAByteArray) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 seeds(seed);
  for (int round = 0; round < 3; ++round) {
    Handle disk = on_fiber([&] { return open("disk.qcow2"); });
    on_fiber([&] {
      base::WaitGroup running;
      for (unsigned i = 0; i < kFibers; ++i) {
        running.add();
        loops_.next().post("worker", [&, i, worker_seed = seeds()] {
          std::mt19937_64 random(worker_seed);
          const uint64_t stripe = size_ / kFibers;
          const uint64_t begin = i * stripe;
          const uint64_t end = i + 1 == kFibers ? size_ : begin + stripe;
          for (int n = 0; n < steps() && !HasFatalFailure(); ++n) step(disk, random, begin, end);
          running.done();
        });
      }
      running.wait();
      expect_content(disk);
      close(disk);
    });
    expect_sound(false);
    if (HasFailure()) return;
  }
  on_fiber([&] {
    Handle disk = open("disk.qcow2", false);
    expect_content(disk);
    close(disk);
  });
  if (!have_qemu()) return;
  expect_clean("disk.qcow2");
  std::ofstream(path("model.raw"), std::ios::binary)
      .write(reinterpret_cast<const char*>(model_.data()), static_cast<std::streamsize>(size_));
  EXPECT_EQ(run("qemu-img compare -f qcow2 -F raw " + path("disk.qcow2") + " " + path("model.raw")),
            0)
      << last_output_;
}

INSTANTIATE_TEST_SUITE_P(
    Formats, Qcow2Model,
    testing::Values(Format{2, 16, 4, false}, Format{2, 12, 4, true}, Format{3, 16, 4, false},
                    Format{3, 16, 4, true}, Format{3, 9, 4, true}, Format{3, 9, 6, false},
                    Format{3, 12, 0, true}, Format{3, 13, 1, false}, Format{3, 10, 2, true},
                    Format{3, 15, 3, true}, Format{3, 16, 5, false}, Format{3, 21, 6, true},
                    Format{3, 20, 4, false}, Format{3, 14, 4, true, true},
                    Format{3, 14, 6, false, true}, Format{3, 16, 4, true, true},
                    Format{3, 16, 1, false, true}, Format{3, 21, 4, true, true}),
    name_of);

}  // namespace
}  // namespace minivmm::block
