// SPDX-License-Identifier: Apache-2.0
// Power cuts while an overlay is committed: whatever of the base was written, it is sound, and what
// the overlay shows has not changed; with all of it written the base shows the same by itself.
#include <vector>

#include <fmt/core.h>

#include "block/formats/qcow2/check.h"
#include "block/graph/snapshots.h"
#include "block/jobs/copy_job.h"
#include "crash_states.h"
#include "graph_fixture.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  bool extended_l2 = false;
  bool snapshot = false;  // the base has one, so clusters are copied on write
};

class Qcow2CommitCrash : public GraphTest, public testing::WithParamInterface<Case> {
 protected:
  static constexpr uint64_t kDisk = 600 * 1024;

  static std::shared_ptr<TestFile> make(const char* backing) {
    return make_test_image({.size = kDisk,
                            .version = GetParam().version,
                            .cluster_bits = GetParam().cluster_bits,
                            .refcount_order = GetParam().refcount_order,
                            .extended_l2 = GetParam().extended_l2,
                            .backing_file = backing,
                            .backing_format = backing[0] != '\0' ? "qcow2" : ""});
  }
  static void write_some(Node& node, std::mt19937_64& random, unsigned times) {
    Edge disk(node.shared_from_this(), "guest", Permissions::front_end(true));
    for (unsigned i = 0; i < times; ++i) {
      const uint64_t length = 512 * (1 + random() % 100);
      const uint64_t offset = random() % ((kDisk - length) / 512 + 1) * 512;
      if (i % 5 == 4) {
        disk.write_zeroes(offset, length, {.may_unmap = true});
        continue;
      }
      const Bytes data = pattern_bytes(length, random());
      disk.write(offset, base::SingleBuffer(std::span<const std::byte>(data)));
    }
  }
  static Bytes read_all(const std::shared_ptr<Node>& node) {
    Edge disk(node, "reader", {0, 0});
    Bytes out(disk.size());
    disk.read(0, base::SingleBuffer(out.data(), out.size()));
    return out;
  }
  static void expect_sound(const std::shared_ptr<TestFile>& file) {
    Edge edge(file, "check", {0, Permissions::kWrite | Permissions::kResize});
    std::string lines;
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    ASSERT_EQ(result.corruptions + result.check_errors, 0U) << lines;
  }
  static std::shared_ptr<TestFile> copy_of(Bytes content) {
    auto out = std::make_shared<TestFile>();
    out->set_content(std::move(content));
    return out;
  }

  // The base is logged from the beginning of the commit.
  void commit(const std::shared_ptr<TestFile>& overlay_file,
              const std::shared_ptr<TestFile>& base_file) {
    const auto overlay = open_test_image(overlay_file, nullptr, true);
    const auto base = open_test_image(base_file);
    base_file->start_log();
    {
      Edge from(overlay, "commit", {0, 0});
      Edge to(base, "commit", Permissions::front_end(true));
      LayersSource source({&from});
      CopyJob job(source, "overlay", to, "base", {.request = 64 << 10});
      job.run(loops_);
    }
    base->close();
  }
};

TEST_P(Qcow2CommitCrash, LosesNothingAndLeavesASoundBase) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned states = crash_states(20);
  on_fiber([&] {
    std::mt19937_64 random(seed);
    const auto base_file = make("");
    const auto overlay_file = make("base");
    {
      const auto base = open_test_image(base_file);
      write_some(*base, random, 10);
      if (GetParam().snapshot) (void)base->snapshots()->create("before");
      base->close();
    }
    const auto start = base_file->content();
    {
      const auto base = open_test_image(copy_of(start), nullptr, true);
      const auto overlay = open_test_image(overlay_file, base);
      write_some(*overlay, random, 12);
      overlay->close();
    }
    const auto shown = [&](const std::shared_ptr<TestFile>& base) {
      return read_all(open_test_image(copy_of(overlay_file->content()),
                                      open_test_image(base, nullptr, true), true));
    };
    const Bytes wanted = shown(copy_of(start));
    commit(overlay_file, base_file);
    ASSERT_TRUE(read_all(open_test_image(copy_of(base_file->content()), nullptr, true)) == wanted);
    for (unsigned i = 0; i < states && !HasFatalFailure(); ++i) {
      const uint64_t cut = random() % (base_file->now() + 1);
      SCOPED_TRACE(fmt::format("cut {} of {}", cut, base_file->now()));
      const auto after = copy_of(base_file->after_power_cut(cut, random));
      ASSERT_NO_FATAL_FAILURE(expect_sound(after));
      ASSERT_TRUE(shown(after) == wanted);
      // The commit is done again, and goes through.
      commit(overlay_file, after);
      ASSERT_NO_FATAL_FAILURE(expect_sound(after));
      ASSERT_TRUE(read_all(open_test_image(after, nullptr, true)) == wanted);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Formats, Qcow2CommitCrash,
                         testing::Values(Case{"v3_4k", 3, 12, 4}, Case{"v2_1k", 2, 10, 4},
                                         Case{"v3_64k_snapshot", 3, 16, 4, false, true},
                                         Case{"v3_512_snapshot", 3, 9, 4, false, true},
                                         Case{"v3_16k_extended", 3, 14, 4, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace minivmm::block
