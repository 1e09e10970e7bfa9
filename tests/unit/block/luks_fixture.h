// SPDX-License-Identifier: Apache-2.0
// LUKS images in temporary files, for tests.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include <fmt/core.h>

#include "block/crypto/luks1_amend.h"
#include "block/crypto/secret.h"
#include "block/formats/luks/luks_create.h"
#include "block/formats/luks/luks_node.h"
#include "block/protocols/memory.h"
#include "graph_fixture.h"
#include "temp_directory.h"

namespace minivmm::block {

// Secrets sec0 to sec3, whose passwords are "password 0" to "password 3".
class LuksTest : public GraphTest {
 protected:
  LuksTest() {
    for (int i = 0; i < 4; ++i) {
      crypto::secrets().add(fmt::format("sec{}", i),
                            crypto::SecureBytes(bytes_of(fmt::format("password {}", i))));
    }
  }
  ~LuksTest() override {
    for (int i = 0; i < 4; ++i) crypto::secrets().remove(fmt::format("sec{}", i));
  }

  // The least that a key slot may cost, so that tests are quick.
  static luks::CreateOptions options(uint64_t size, const std::string& more = "") {
    Options given = Options::from_keys("key-secret=sec0,iter-time=1" + more);
    luks::CreateOptions out = luks::take_create_options(given);
    given.finish("test");
    out.size = size;
    return out;
  }
  std::string path(const std::string& name) const { return files_ / name; }

  void create(const std::string& name, const luks::CreateOptions& options) {
    std::ofstream(path(name)).close();
    graph_.add(Options::from_keys("driver=file,node-name=new,filename=" + path(name)));
    {
      Edge edge(graph_.find("new"), "create", Permissions::format_file(true));
      luks::create_image(edge, options);
    }
    graph_.remove("new");
  }

  Handle open(const std::string& name, bool writable = true, const std::string& more = "",
              const std::string& secret = "sec0") {
    graph_.add(Options::from_keys(fmt::format(
        "driver=luks,node-name=disk,key-secret={},file.driver=file,file.filename={}{}{}", secret,
        path(name), writable ? "" : ",read-only=on", more)));
    return graph_.attach("disk", "test", Permissions::front_end(writable));
  }
  void close(Handle& handle) {
    handle.close();
    graph_.remove("disk");
  }
  // True if the secret opens the image. Other errors than a wrong password are failures.
  bool opens(const std::string& name, const std::string& secret) {
    const int err = error_number([&] {
      Handle disk = open(name, false, "", secret);
      close(disk);
    });
    EXPECT_TRUE(err == 0 || err == EACCES) << err;
    return err == 0;
  }
  // Of the open node "disk".
  void amend(const std::string& keys, bool force = false) {
    Options given = Options::from_keys(keys);
    crypto::Luks1AmendOptions wanted = crypto::take_luks1_amend_options(given);
    given.finish("amend");
    wanted.force = force;
    dynamic_cast<LuksNode&>(*graph_.find("disk")).amend(wanted);
  }

  // The exit status of a shell command; its output is kept in last_output_.
  int run(const std::string& command) {
    const std::string out = path("command.out");
    const int status = std::system((command + " > " + out + " 2>&1").c_str());
    last_output_ = files_.read("command.out");
    return status == -1 ? -1 : WEXITSTATUS(status);
  }

  static std::span<const std::byte> bytes_of(std::string_view text) {
    return std::as_bytes(std::span(text.data(), text.size()));
  }
  static std::vector<std::byte> random_bytes(size_t size, uint64_t seed) {
    std::vector<std::byte> out(size);
    std::mt19937_64 random(seed);
    for (auto& byte : out) byte = static_cast<std::byte>(random());
    return out;
  }
  static std::vector<std::byte> read_bytes(Handle& handle, uint64_t offset, size_t size) {
    std::vector<std::byte> out(size);
    handle.read(offset, base::SingleBuffer(std::span(out)));
    return out;
  }
  static void write_bytes(Handle& handle, uint64_t offset, const std::vector<std::byte>& bytes) {
    handle.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
  }

  TempDirectory files_;
  std::string last_output_;
};

}  // namespace minivmm::block
