// SPDX-License-Identifier: Apache-2.0
// Memory disks with random content, and reading them back, for tests of jobs.
#pragma once

#include <string>

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "base/buffer.h"
#include "block/graph/edge.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {

class JobTest : public GraphTest {
 protected:
  using Bytes = std::vector<std::byte>;

  ~JobTest() override {
    on_fiber([&] { edges_.clear(); });
  }

  // An edge on the node that `keys` describe. The fixture owns it.
  Edge& open(const std::string& keys) {
    const uint8_t uses = Permissions::kWrite | Permissions::kResize;
    on_fiber([&] {
      edges_.push_back(std::make_unique<Edge>(graph_.add(Options::from_keys(keys)), "the test",
                                              Permissions{.uses = uses, .shares = uses}));
    });
    return *edges_.back();
  }
  Edge& memory(uint64_t size) { return open(fmt::format("driver=memory,size={}", size)); }

  void write(Edge& edge, uint64_t offset, const Bytes& bytes) {
    on_fiber([&] { edge.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes))); });
  }
  Bytes content(Edge& edge) {
    Bytes out(edge.size());
    on_fiber([&] { edge.read(0, base::SingleBuffer(std::span<std::byte>(out))); });
    return out;
  }
  // Data and zeroes in turn, in runs of many lengths.
  Bytes mixture(uint64_t size, std::mt19937& random) {
    Bytes out(size);
    for (uint64_t at = 0; at < size;) {
      const uint64_t run = std::min<uint64_t>(size - at, 1 + random() % 200'000);
      if (random() % 2 != 0) {
        for (uint64_t i = 0; i < run; ++i) out[at + i] = static_cast<std::byte>(random() | 1);
      }
      at += run;
    }
    return out;
  }

  std::vector<std::unique_ptr<Edge>> edges_;
};

}  // namespace minivmm::block
