// SPDX-License-Identifier: Apache-2.0
// Our server as other programs meet it: `minivmm serve` with three exports, in a directory of its
// own.
#pragma once

#include <signal.h>
#include <stdlib.h>
#include <string>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

#include <gtest/gtest.h>

#include "process.h"

#define SKIP_WITHOUT(program) \
  if (!have(program)) GTEST_SKIP() << program << " is not installed"

namespace minivmm::nbd {

inline constexpr size_t kSize = 64 << 20;

class Peers : public testing::Test {
 protected:
  Peers() {
    std::string name = testing::TempDir() + "nbd_peers_XXXXXX";
    directory_ = ::mkdtemp(name.data());
    // A megabyte of noise, a hole, and noise at the end.
    std::mt19937_64 random(7);
    std::ofstream file(path("disk.raw"), std::ios::binary);
    const auto noise = [&](size_t bytes) {
      for (size_t i = 0; i < bytes; i += 8) {
        const uint64_t v = random();
        file.write(reinterpret_cast<const char*>(&v), 8);
      }
    };
    noise(1 << 20);
    file.seekp(kSize - (2 << 20));
    noise(2 << 20);
  }
  ~Peers() override {
    if (server_) {
      server_->signal(SIGTERM);
      EXPECT_EQ(server_->wait(10), 0) << server_->output();
      EXPECT_FALSE(std::filesystem::exists(path("m.sock")));
    }
    std::filesystem::remove_all(directory_);
  }

  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  std::string uri(const std::string& name) const {
    return "nbd+unix:///" + name + "?socket=" + path("m.sock");
  }
  // Exports "disk" (the file, writable), "ro" (another, read-only) and "mem".
  void serve(std::vector<std::string> extra = {}) {
    std::filesystem::copy_file(path("disk.raw"), path("ro.raw"),
                               std::filesystem::copy_options::overwrite_existing);
    std::vector<std::string> arguments = {MINIVMM,
                                          "serve",
                                          "--io-threads=2",
                                          "--nbd=nbd+unix:///?socket=" + path("m.sock"),
                                          "--disk=" + path("ro.raw") + ",id=ro,format=raw,ro",
                                          "--export=ro",
                                          "--disk=" + path("disk.raw") + ",id=disk,format=raw",
                                          "--export=disk,writable",
                                          "--blockdev=driver=memory,node-name=mem,size=64M",
                                          "--export=mem,writable"};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    server_ = std::make_unique<Process>(arguments, path("log"));
  }
  // A command that must succeed; returns its output.
  std::string must(const std::string& command) {
    const Outcome outcome = run(command);
    EXPECT_EQ(outcome.status, 0) << command << "\n" << outcome.output;
    return outcome.output;
  }
  // Where the server says that it serves an export over TCP; it says so when it is ready.
  std::vector<std::string> tcp_uris(const std::string& name,
                                    const std::string& prefix = "nbd://") const {
    std::vector<std::string> out;
    const size_t wanted = prefix == "nbd://" ? 2 : 1;
    for (int i = 0; i < 500 && out.size() < wanted; ++i) {
      out.clear();
      std::istringstream words(server_->output());
      for (std::string word; words >> word;) {
        if (word.starts_with(prefix) && word.ends_with("/" + name)) out.push_back(word);
      }
      ::usleep(10'000);
    }
    return out;
  }
  std::string sum(const std::string& file) { return must("sha256sum < " + file); }

  std::string directory_;
  std::unique_ptr<Process> server_;
};

inline void expect_in(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << part << " is not in\n" << text;
}

}  // namespace minivmm::nbd
