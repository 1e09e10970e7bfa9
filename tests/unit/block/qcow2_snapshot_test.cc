// SPDX-License-Identifier: Apache-2.0
// Internal snapshots: the disk and every snapshot hold what a model says, whatever is written,
// discarded, made, gone back to and deleted in which order; the metadata is clean after each; a
// power cut at any moment loses neither the disk nor a snapshot; nonsense is refused.
#include <cerrno>
#include <map>

#include <fmt/core.h>

#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/repair.h"
#include "block/formats/qcow2/snapshots/snapshot_view.h"
#include "block/graph/snapshots.h"
#include "crash_states.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint64_t kBlock = 512;

struct Case {
  const char* name;
  unsigned version;
  unsigned cluster_bits;
  unsigned refcount_order;
  uint64_t disk;
  bool extended_l2 = false;
  bool backing = false;
};

class Qcow2Snapshot : public GraphTest, public testing::WithParamInterface<Case> {
 protected:
  static Bytes random_bytes(uint64_t length, std::mt19937_64& random) {
    Bytes out(length);
    for (uint64_t i = 0; i < length; i += 8) {
      const uint64_t value = random();
      std::memcpy(out.data() + i, &value, 8);
    }
    return out;
  }
  std::shared_ptr<TestFile> make(std::mt19937_64& random) {
    const Case& c = GetParam();
    base_ = c.backing ? random_bytes(c.disk / 2, random) : Bytes();
    auto file = make_test_image({.size = c.disk,
                                 .version = c.version,
                                 .cluster_bits = c.cluster_bits,
                                 .refcount_order = c.refcount_order,
                                 .extended_l2 = c.extended_l2,
                                 .backing_file = c.backing ? "base" : "",
                                 .backing_format = c.backing ? "raw" : ""});
    return file;
  }
  std::shared_ptr<Node> base_node() const {
    if (base_.empty()) return nullptr;
    auto out = std::make_shared<TestFile>();
    out->set_content(base_);
    return out;
  }
  std::shared_ptr<Qcow2Node> open(std::shared_ptr<TestFile> file) const {
    return open_test_image(std::move(file), base_node());
  }
  Bytes first_content() const {
    Bytes out = base_;
    out.resize(GetParam().disk);
    return out;
  }
  static Bytes read_all(const std::shared_ptr<Node>& node) {
    Bytes out(node->size());
    Edge disk(node, "reader", {0, Permissions::kWrite | Permissions::kResize}, EdgeKind::kRoot);
    disk.read(0, base::SingleBuffer(out.data(), out.size()));
    return out;
  }
  // Of a copy of the file: another node may have it open.
  Bytes read_snapshot(const std::shared_ptr<TestFile>& original, const std::string& id) const {
    auto file = std::make_shared<TestFile>();
    file->set_content(original->content());
    qcow2::Header header;
    {
      Edge edge(file, "open", {0, Permissions::kWrite | Permissions::kResize});
      header = qcow2::header_of_snapshot(edge, qcow2::read_header(edge), {.id = id});
    }
    const auto sizes = qcow2::choose_cache_sizes(header, {}, 1 << 20, {}, {});
    const auto node = std::make_shared<Qcow2Node>(
        NodeConfig{"snapshot", true}, Qcow2Node::Children{std::move(file), nullptr, base_node()},
        std::move(header), sizes);
    return read_all(node);
  }
  // A write or a discard, which the model does as well.
  static void change(const std::shared_ptr<Node>& node, Bytes& model, std::mt19937_64& random) {
    Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
    const uint64_t length =
        (1 + random() % std::clamp<uint64_t>(model.size() / kBlock / 4, 1, 300)) * kBlock;
    const uint64_t offset = random() % ((model.size() - length) / kBlock + 1) * kBlock;
    if (random() % 4 == 0) {
      disk.write_zeroes(offset, length, {.may_unmap = random() % 2 == 0});
      std::fill_n(model.begin() + static_cast<long>(offset), length, std::byte{0});
    } else {
      const Bytes data = random_bytes(length, random);
      disk.write(offset, base::SingleBuffer(std::span<const std::byte>(data)));
      std::copy(data.begin(), data.end(), model.begin() + static_cast<long>(offset));
    }
  }
  // False: narrow refcounts cannot count that many references. Then nothing has changed.
  static bool counted(const std::function<void()>& work) {
    try {
      work();
      return true;
    } catch (const base::Error& e) {
      if (e.err() != EFBIG || GetParam().refcount_order > 1) throw;
      return false;
    }
  }
  static std::string check(const std::shared_ptr<TestFile>& file, qcow2::CheckResult& result) {
    std::string lines;
    Edge edge(file, "check", {0, Permissions::kWrite | Permissions::kResize});
    result = qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    return lines;
  }
  static void expect_clean(const std::shared_ptr<TestFile>& file) {
    qcow2::CheckResult result;
    const std::string lines = check(file, result);
    ASSERT_EQ(result.corruptions + result.leaks + result.check_errors, 0U) << lines;
  }
  static uint64_t a_seed() {
    const char* given = std::getenv("MINIVMM_TEST_SEED");
    return given != nullptr ? std::strtoull(given, nullptr, 0) : std::random_device{}();
  }

  // What a power cut left of an image whose disk was `disk` and whose snapshot was `old`.
  void expect_survived(std::shared_ptr<TestFile> file, char what, const Bytes& disk,
                       const Bytes& old) {
    qcow2::CheckResult result;
    const std::string lines = check(file, result);
    ASSERT_EQ(result.corruptions + result.check_errors, 0U) << lines;  // leaks are allowed
    Bytes now;
    {
      auto node = open(file);
      now = read_all(node);
      ASSERT_TRUE(now == disk || (what == 'a' && now == old));
      for (const auto& info : node->snapshots()->list()) {
        ASSERT_TRUE(read_snapshot(file, info.id) == (info.name == "old" ? old : disk)) << info.name;
      }
      ASSERT_TRUE(what == 'r' || !node->snapshots()->list().empty());
      // Work goes on with it, and reaches no snapshot.
      std::mt19937_64 random(7);
      for (int i = 0; i < 4; ++i) change(node, now, random);
      for (const auto& info : node->snapshots()->list()) {
        ASSERT_TRUE(read_snapshot(file, info.id) == (info.name == "old" ? old : disk)) << info.name;
      }
      node->close();
    }
    {
      Edge edge(file, "repair", Permissions::format_file(true));
      (void)qcow2::repair_image(edge, qcow2::Repair::kLeaks, [](const std::string&) {});
    }
    ASSERT_NO_FATAL_FAILURE(expect_clean(file));
    ASSERT_TRUE(read_all(open(file)) == now);
  }

  Bytes base_;
};

TEST_P(Qcow2Snapshot, TheDiskAndEverySnapshotHoldWhatTheModelSays) {
  const uint64_t seed = a_seed();
  SCOPED_TRACE(fmt::format("MINIVMM_TEST_SEED={}", seed));
  on_fiber([&] {
    std::mt19937_64 random(seed);
    auto file = make(random);
    Bytes model = first_content();
    std::map<std::string, Bytes> snapshots;
    auto node = open(file);
    for (int step = 0; step < 60 && !HasFatalFailure(); ++step) {
      SCOPED_TRACE(fmt::format("step {}", step));
      Snapshots& commands = *node->snapshots();
      const auto pick = [&] {
        return std::next(snapshots.begin(), static_cast<long>(random() % snapshots.size()));
      };
      switch (random() % 8) {
        case 0: {
          const std::string name = fmt::format("snapshot {}", step);
          std::string id;
          if (counted([&] { id = commands.create(name); })) snapshots[id] = model;
          break;
        }
        case 1:
          if (!snapshots.empty()) {
            const auto it = pick();
            if (counted([&] { commands.apply(it->first); })) model = it->second;
          }
          break;
        case 2:
          if (!snapshots.empty()) {
            const auto it = pick();
            for (const auto& info : commands.list()) {
              if (info.id == it->first) commands.remove(info.name);
            }
            snapshots.erase(it);
          }
          break;
        case 3:
          node->close();
          node.reset();
          ASSERT_NO_FATAL_FAILURE(expect_clean(file));
          node = open(file);
          break;
        case 4:
          if (GetParam().version >= 3) {
            Edge disk(node, "guest", Permissions::front_end(true), EdgeKind::kRoot);
            const uint64_t size = (1 + random() % (2 * GetParam().disk / kBlock)) * kBlock;
            disk.truncate(size);
            model.resize(size);
          }
          break;
        default:
          change(node, model, random);
      }
      if (step % 8 != 7) continue;
      ASSERT_TRUE(read_all(node) == model);
      for (const auto& [id, content] : snapshots) {
        ASSERT_TRUE(read_snapshot(file, id) == content) << "snapshot " << id;
      }
    }
    ASSERT_EQ(node->snapshots()->list().size(), snapshots.size());
    node->close();
    node.reset();
    ASSERT_NO_FATAL_FAILURE(expect_clean(file));
  });
}

TEST_P(Qcow2Snapshot, APowerCutLosesNeitherTheDiskNorASnapshot) {
  const unsigned states = crash_states(3 * 50);
  const uint64_t seed = a_seed();
  SCOPED_TRACE(fmt::format("MINIVMM_TEST_SEED={}", seed));
  on_fiber([&] {
    std::mt19937_64 random(seed);
    for (const char* what : {"create", "apply", "remove"}) {
      SCOPED_TRACE(what);
      auto file = make(random);
      Bytes old = first_content();
      Bytes disk = old;
      {
        auto node = open(file);
        for (int i = 0; i < 10; ++i) change(node, old, random);
        (void)node->snapshots()->create("old");
        disk = old;
        for (int i = 0; i < 6; ++i) change(node, disk, random);
        node->close();
      }
      file->start_log();
      {
        auto node = open(file);
        if (what[0] == 'c') (void)node->snapshots()->create("new");
        if (what[0] == 'a') node->snapshots()->apply("old");
        if (what[0] == 'r') node->snapshots()->remove("old");
        node->close();
      }
      ASSERT_NO_FATAL_FAILURE(expect_clean(file));
      const uint64_t end = file->now();
      for (unsigned i = 0; i < states / 3; ++i) {
        const uint64_t cut = random() % (end + 1);
        SCOPED_TRACE(fmt::format("cut at {} of {}", cut, end));
        auto copy = std::make_shared<TestFile>();
        copy->set_content(file->after_power_cut(cut, random));
        ASSERT_NO_FATAL_FAILURE(expect_survived(copy, what[0], disk, old));
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Images, Qcow2Snapshot,
                         testing::Values(Case{"v3_64k", 3, 16, 4, 3 << 20},
                                         Case{"v3_512", 3, 9, 4, 512 << 10},
                                         Case{"v3_4k_wide", 3, 12, 6, 2 << 20, false, true},
                                         Case{"v3_4k_narrow", 3, 12, 1, 2 << 20},
                                         Case{"v2_4k", 2, 12, 4, 2 << 20, false, true},
                                         Case{"v3_16k_extended", 3, 14, 4, 2 << 20, true, true}),
                         [](const auto& param_info) { return std::string(param_info.param.name); });

}  // namespace
}  // namespace minivmm::block
