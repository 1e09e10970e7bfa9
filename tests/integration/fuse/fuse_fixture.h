// SPDX-License-Identifier: Apache-2.0
// A mount served by two loops of this process, over nodes of a graph, in a directory of its own.
// Tests skip, saying why, where FUSE cannot be mounted.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/sync.h"
#include "base/unique_fd.h"
#include "block/graph/graph.h"
#include "block/protocols/memory.h"
#include "fuse/mount.h"

namespace minivmm::fuse {

// A directory under the system's temporary one; removed with what is in it.
class TempDir {
 public:
  TempDir();
  ~TempDir();
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  std::string path(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// A memory disk whose requests a test holds back and counts.
class GatedNode final : public block::Node {
 public:
  GatedNode(const std::string& name, uint64_t size);

  // Requests wait from hold() to let_go().
  void hold() { open_.reset(); }
  void let_go() { open_.set(); }
  // How many wait now; the most that ever did.
  int waiting() const { return waiting_; }
  int most_waiting() const { return most_waiting_; }
  int flushes() const { return flushes_; }
  int durable_writes() const { return durable_writes_; }
  // From now on each request fails with this errno; 0 ends that.
  void fail_with(int err) { error_ = err; }

 private:
  void driver_read(uint64_t offset, block::IoSpan to) override;
  void driver_write(uint64_t offset, block::IoSpan from, block::WriteFlags flags) override;
  void driver_flush() override;
  void pass();

  std::vector<std::byte> content_;
  std::mutex mutex_;  // guards content_; never held across a wait
  base::Event open_;
  std::atomic<int> waiting_{0};
  std::atomic<int> most_waiting_{0};
  std::atomic<int> flushes_{0};
  std::atomic<int> durable_writes_{0};
  std::atomic<int> error_{0};
};

bool can_mount();
#define MINIVMM_SKIP_WITHOUT_FUSE() \
  if (!can_mount()) GTEST_SKIP() << "/dev/fuse cannot be used here"

class FuseTest : public testing::Test {
 protected:
  static constexpr uint64_t kSize = uint64_t{4} << 20;

  void SetUp() override { MINIVMM_SKIP_WITHOUT_FUSE(); }
  // Stops the mount if the test has not, and expects that it ends well.
  void TearDown() override;

  template <typename Body>
  auto on_loop(Body&& body) {
    return loops_.loop(0).call("test", std::forward<Body>(body));
  }

  // Adds a node and shows it. `options` without node-name, as for --blockdev.
  void add(const std::string& name, const std::string& options, bool writable = true);
  std::shared_ptr<GatedNode> add_gated(const std::string& name, uint64_t size = kSize);
  // A second user of a node, as another front end is.
  block::Handle attach(const std::string& name, bool writable = true);
  void start();
  std::vector<std::string> stop(std::chrono::milliseconds deadline = std::chrono::seconds(10));

  std::string file(const std::string& name) const { return dir_.path("mnt/" + name); }
  base::UniqueFd open(const std::string& name, int flags) const;

  TempDir dir_;
  base::LoopGroup loops_{2};
  block::Graph graph_;
  std::unique_ptr<Mount> mount_ = std::make_unique<Mount>(loops_, dir_.path("mnt"));
  bool stopped_ = false;
  // Handles of tests, closed before the graph.
  std::vector<block::Handle> handles_;
};

// Page-aligned memory, for O_DIRECT.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t size, int fill = 0);
  ~AlignedBytes();
  AlignedBytes(const AlignedBytes&) = delete;
  AlignedBytes& operator=(const AlignedBytes&) = delete;
  std::byte* data() noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  std::span<std::byte> span() noexcept { return {data_, size_}; }

 private:
  std::byte* data_;
  size_t size_;
};

std::vector<std::byte> random_bytes(size_t size, uint64_t seed);
// Waits up to ten seconds for a condition that other threads bring about.
bool eventually(const std::function<bool()>& condition);
// Runs a command with its output thrown away; its exit status, or -1. Empty `which`: not installed.
int run(const std::vector<std::string>& command);
bool installed(const std::string& program);
// True if anything is mounted at `path`.
bool is_mounted(const std::string& path);

}  // namespace minivmm::fuse
