// SPDX-License-Identifier: Apache-2.0
// Images whose tables lie: a good one as bytes to be patched, and what comes of using the result.
#pragma once

#include <vector>

#include "base/bytes.h"
#include "base/log.h"
#include "block/formats/qcow2/check.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {

class Qcow2Hostile : public GraphTest {
 protected:
  using Bytes = std::vector<std::byte>;
  static constexpr uint64_t kCluster = 4096;
  static constexpr uint64_t kDisk = 4 << 20;

  // Each damaged image is worth a line in a log, and there are hundreds here.
  Qcow2Hostile() { base::set_log_level(base::LogLevel::kOff); }
  ~Qcow2Hostile() override { base::set_log_level(base::LogLevel::kWarning); }

  // A good image with one allocated cluster at guest offset 0, as bytes. Fiber.
  Bytes good_image(unsigned version = 3) {
    auto file = make_test_image({.size = kDisk, .version = version, .cluster_bits = 12});
    auto node = open_test_image(file);
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes data(kCluster, std::byte{5});
      disk.write(0, base::SingleBuffer(std::span(data)));
    }
    node->close();
    return file->content();
  }
  static uint64_t get(const Bytes& image, uint64_t offset) {
    return base::load_be<uint64_t>(image.data() + offset);
  }
  static void put(Bytes& image, uint64_t offset, uint64_t value) {
    base::store_be(image.data() + offset, value);
  }
  static uint64_t l1_offset(const Bytes& image) { return get(image, 40); }
  static uint64_t l2_offset(const Bytes& image) {
    return get(image, l1_offset(image)) & qcow2::kOffsetMask;
  }

  uint64_t corruptions(const Bytes& image) {
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    Edge edge(file, "check", {});
    return qcow2::check_image(edge, [](const std::string&) {}).corruptions;
  }

  struct Outcome {
    int read = 0;   // errno of reading guest offset 0
    int write = 0;  // errno of writing there
    int later = 0;  // errno of a write elsewhere afterwards
    uint64_t incompatible = 0;
    Bytes image;
  };
  Outcome use(const Bytes& image) {
    auto file = std::make_shared<TestFile>();
    file->set_content(image);
    auto node = open_test_image(file);
    Outcome out;
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      Bytes data(kCluster, std::byte{9});
      out.read = error_number([&] {
        Bytes to(kCluster);
        disk.read(0, base::SingleBuffer(to.data(), to.size()));
      });
      out.write = error_number(
          [&] { disk.write(0, base::SingleBuffer(std::span<const std::byte>(data))); });
      out.later = error_number(
          [&] { disk.write(kDisk / 2, base::SingleBuffer(std::span<const std::byte>(data))); });
    }
    node->close();
    out.image = file->content();
    out.incompatible = get(out.image, 72);
    return out;
  }
  // Reads and writes are refused, the image is marked, nothing else in it has changed.
  void expect_refused(const Bytes& image) {
    const Outcome out = use(image);
    EXPECT_EQ(out.read, EIO);
    EXPECT_EQ(out.write, EIO);
    EXPECT_EQ(out.later, EIO) << "writes go on after corruption was found";
    EXPECT_EQ(out.incompatible, qcow2::kIncompatCorrupt);
    Bytes expected = image;
    put(expected, 72, qcow2::kIncompatCorrupt);
    EXPECT_EQ(out.image, expected);
    EXPECT_GT(corruptions(image), 0U);
  }
};

}  // namespace minivmm::block
