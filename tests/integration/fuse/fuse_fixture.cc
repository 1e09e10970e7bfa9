// SPDX-License-Identifier: Apache-2.0
#include "fuse_fixture.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <thread>

#include <spawn.h>

#include "base/error.h"
#include "fuse/mountpoint.h"

namespace minivmm::fuse {

namespace fs = std::filesystem;

TempDir::TempDir() {
  std::string pattern = fs::temp_directory_path() / "minivmm-fuse-XXXXXX";
  if (::mkdtemp(pattern.data()) == nullptr) throw base::errno_error(errno, pattern);
  path_ = pattern;
}

TempDir::~TempDir() {
  // A failed test may leave a mount: nothing may delete through it.
  if (is_mounted(path("mnt"))) (void)run({"umount", "-l", path("mnt")});
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

GatedNode::GatedNode(const std::string& name, uint64_t size)
    : Node(name, "gated", false), content_(size) {
  set_size(size);
  open_.set();
}

void GatedNode::pass() {
  const int now = ++waiting_;
  int most = most_waiting_;
  while (most < now && !most_waiting_.compare_exchange_weak(most, now)) {
  }
  open_.wait();
  --waiting_;
  if (error_ != 0) throw base::Error(error_, "made to fail");
}

void GatedNode::driver_read(uint64_t offset, block::IoSpan to) {
  pass();
  const std::lock_guard lock(mutex_);
  base::copy_to(to, 0, std::span(content_).subspan(offset, to.bytes()));
}

void GatedNode::driver_write(uint64_t offset, block::IoSpan from, block::WriteFlags flags) {
  pass();
  if (flags.fua) ++durable_writes_;
  const std::lock_guard lock(mutex_);
  base::copy_from(from, 0, std::span(content_).subspan(offset, from.bytes()));
}

void GatedNode::driver_flush() {
  pass();
  ++flushes_;
}

bool can_mount() {
  const base::UniqueFd device(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
  return static_cast<bool>(device) && (::geteuid() == 0 || installed("fusermount3"));
}

void FuseTest::add(const std::string& name, const std::string& options, bool writable) {
  on_loop([&] {
    block::Options parsed = block::Options::from_text(options);
    parsed.set("node-name", name);
    graph_.add(std::move(parsed));
    mount_->add_file(
        name,
        graph_.attach(name, "FUSE file '" + name + "'", block::Permissions::front_end(writable)),
        {.writable = writable});
  });
}

std::shared_ptr<GatedNode> FuseTest::add_gated(const std::string& name, uint64_t size) {
  auto node = std::make_shared<GatedNode>(name, size);
  on_loop([&] {
    graph_.adopt(node);
    mount_->add_file(
        name, graph_.attach(name, "FUSE file '" + name + "'", block::Permissions::front_end(true)),
        {.writable = true});
  });
  return node;
}

block::Handle FuseTest::attach(const std::string& name, bool writable) {
  return on_loop(
      [&] { return graph_.attach(name, "another user", block::Permissions::front_end(writable)); });
}

void FuseTest::start() {
  on_loop([&] { mount_->start(); });
}

std::vector<std::string> FuseTest::stop(std::chrono::milliseconds deadline) {
  stopped_ = true;
  return on_loop([&] { return mount_->stop(deadline); });
}

void FuseTest::TearDown() {
  if (!stopped_) {
    EXPECT_THAT(stop(), testing::IsEmpty());
  }
  on_loop([&] {
    for (block::Handle& handle : handles_) handle.close();
    graph_.close();
  });
}

base::UniqueFd FuseTest::open(const std::string& name, int flags) const {
  return base::UniqueFd(::open(file(name).c_str(), flags | O_CLOEXEC));
}

AlignedBytes::AlignedBytes(size_t size, int fill)
    : data_(static_cast<std::byte*>(std::aligned_alloc(4096, (size + 4095) / 4096 * 4096))),
      size_(size) {
  std::memset(data_, fill, size);
}

AlignedBytes::~AlignedBytes() { std::free(data_); }

std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> out(size);
  for (std::byte& b : out) b = static_cast<std::byte>(random());
  return out;
}

bool eventually(const std::function<bool()>& condition) {
  const auto end = base::Clock::now() + std::chrono::seconds(10);
  while (base::Clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return condition();
}

int run(const std::vector<std::string>& command) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  ::posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  pid_t child = 0;
  const int error =
      ::posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return -1;
  int status = 0;
  if (::waitpid(child, &status, 0) != child) return -1;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool installed(const std::string& program) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(std::string(path != nullptr ? path : "") + ":/usr/sbin:/sbin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    if (::access((folder + "/" + program).c_str(), X_OK) == 0) return true;
  }
  return false;
}

bool is_mounted(const std::string& path) {
  std::ifstream file("/proc/self/mountinfo");
  std::ostringstream text;
  text << file.rdbuf();
  return !mounts_at(text.str(), path).empty();
}

}  // namespace minivmm::fuse
