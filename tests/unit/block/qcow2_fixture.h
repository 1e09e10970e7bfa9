// SPDX-License-Identifier: Apache-2.0
// qcow2 images in temporary files, made by this driver or by qemu-img, for tests.
#pragma once

#include <string>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include <fmt/core.h>

#include "base/buffer.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "graph_fixture.h"

namespace minivmm::block {

class Qcow2Test : public GraphTest {
 protected:
  Qcow2Test() {
    std::string pattern = (std::filesystem::temp_directory_path() / "qcow2_test.XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp");
    directory_ = pattern;
  }
  ~Qcow2Test() override { std::filesystem::remove_all(directory_); }

  std::string path(const std::string& name) const { return directory_ + "/" + name; }

  // The exit status of a shell command; its output is kept in last_output_.
  int run(const std::string& command) {
    const std::string out = path("command.out");
    const int status = std::system((command + " > " + out + " 2>&1").c_str());
    std::ifstream in(out);
    last_output_.assign(std::istreambuf_iterator<char>(in), {});
    return status == -1 ? -1 : WEXITSTATUS(status);
  }
  bool have_qemu() { return run("command -v qemu-img && command -v qemu-io") == 0; }
  // qemu-img check finds nothing, not even leaks.
  void expect_clean(const std::string& name) {
    EXPECT_EQ(run("qemu-img check -f qcow2 " + path(name)), 0) << last_output_;
  }

  void create(const std::string& name, const qcow2::CreateOptions& options) {
    std::ofstream(path(name)).close();
    on_fiber([&] {
      Options file = Options::from_keys("driver=file,node-name=new,filename=" + path(name));
      graph_.add(std::move(file));
      {
        Edge edge(graph_.find("new"), "create", Permissions::format_file(true));
        qcow2::create_image(edge, options);
      }
      graph_.remove("new");
    });
  }

  // The node `disk` on an image; `more` are further options.
  Handle open(const std::string& name, bool writable = true, const std::string& more = "") {
    graph_.add(Options::from_keys(
        fmt::format("driver=qcow2,node-name=disk,file.driver=file,file.filename={}{}{}", path(name),
                    writable ? "" : ",read-only=on", more)));
    return graph_.attach("disk", "test", Permissions::front_end(writable));
  }
  void close(Handle& handle) {
    handle.close();
    graph_.remove("disk");
  }

  std::string directory_;
  std::string last_output_;
};

inline std::vector<std::byte> pattern_bytes(size_t size, uint64_t seed) {
  std::vector<std::byte> out(size);
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t value = random();
    std::memcpy(out.data() + i, &value, std::min<size_t>(8, size - i));
  }
  return out;
}

inline std::vector<std::byte> read_bytes(Handle& handle, uint64_t offset, size_t size) {
  std::vector<std::byte> out(size);
  handle.read(offset, base::SingleBuffer(out.data(), out.size()));
  return out;
}

inline void write_bytes(Handle& handle, uint64_t offset, const std::vector<std::byte>& bytes) {
  handle.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
}

}  // namespace minivmm::block
