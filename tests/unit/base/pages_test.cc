// SPDX-License-Identifier: Apache-2.0
#include "base/pages.h"

#include <cstdint>
#include <cstring>

#include <gtest/gtest.h>

namespace minivmm::base {
namespace {

TEST(Pages, AreAlignedAndMoveWithTheirContent) {
  for (const size_t size : {size_t{0}, size_t{1}, size_t{511}, size_t{4096}, size_t{100'000}}) {
    Pages pages(size);
    EXPECT_EQ(pages.size(), size);
    if (size >= 4096) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(pages.data()) % 4096, 0u);
    }
    std::memset(pages.data(), 7, size);
    Pages other(std::move(pages));
    EXPECT_EQ(pages.data(), nullptr);  // NOLINT: what is left of it can be used again
    EXPECT_EQ(pages.size(), 0u);
    pages = std::move(other);
    ASSERT_EQ(pages.size(), size);
    for (size_t i = 0; i < size; ++i) ASSERT_EQ(pages.data()[i], std::byte{7});
    pages = Pages();
  }
}

}  // namespace
}  // namespace minivmm::base
