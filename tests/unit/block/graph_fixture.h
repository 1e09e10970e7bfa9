// SPDX-License-Identifier: Apache-2.0
// A graph on two loops, for tests.
#pragma once

#include <string>

#include <utility>

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/loop_group.h"
#include "block/graph/graph.h"

namespace minivmm::block {

class GraphTest : public testing::Test {
 protected:
  ~GraphTest() override {
    loops_.loop(0).call("close graph", [&] { graph_.close(); });
  }

  // Runs `body` as a fiber of the first loop.
  template <typename Body>
  auto on_fiber(Body&& body) {
    return loops_.loop(0).call("test", std::forward<Body>(body));
  }

  base::LoopGroup loops_{2};
  Graph graph_;
};

// The text of the base::Error that `body` throws; "" if it throws none.
template <typename Body>
std::string error_text(Body&& body) {
  try {
    body();
  } catch (const base::Error& e) {
    return e.what();
  }
  return {};
}

template <typename Body>
int error_number(Body&& body) {
  try {
    body();
  } catch (const base::Error& e) {
    return e.err();
  }
  return 0;
}

}  // namespace minivmm::block
