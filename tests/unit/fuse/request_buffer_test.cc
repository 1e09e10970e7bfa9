// SPDX-License-Identifier: Apache-2.0
#include "fuse/request_buffer.h"

#include <cstdint>
#include <cstring>

#include <gtest/gtest.h>

namespace minivmm::fuse {
namespace {

// A WRITE's data has to be usable for O_DIRECT where it lies.
TEST(RequestBuffer, DataIsOnAPageBehindEitherHeader) {
  RequestBuffer buffer;
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 4096, 0U);
  EXPECT_EQ(buffer.request().data() + kRequestHeader, buffer.data());
  EXPECT_EQ(buffer.reply_header() + kReplyHeader, buffer.data());
  // The kernel refuses to fill less than its largest WRITE.
  EXPECT_EQ(buffer.request().size(), kRequestHeader + kMaxTransfer);
  std::memset(buffer.request().data(), 0xaa, buffer.request().size());
}

TEST(BufferPool, GivesTheWarmestAndTakesBackTheRest) {
  BufferPool pool;
  RequestBuffer* const a = pool.take();
  RequestBuffer* const b = pool.take();
  RequestBuffer* const c = pool.take();
  for (RequestBuffer* buffer : {a, b, c}) {
    *buffer->data() = std::byte{1};
    pool.give_back(buffer);
  }
  pool.trim(1);
  EXPECT_EQ(pool.take(), c);
  EXPECT_EQ(*c->data(), std::byte{1}) << "the warmest keeps its memory";
  EXPECT_EQ(pool.take(), b);
  EXPECT_EQ(*b->data(), std::byte{0});
  EXPECT_EQ(pool.take(), a);
  EXPECT_EQ(*a->data(), std::byte{0});
  // Used again they count as warm again.
  *a->data() = std::byte{2};
  pool.give_back(a);
  pool.trim(1);
  EXPECT_EQ(*a->data(), std::byte{2});
  pool.trim(0);
  EXPECT_EQ(*a->data(), std::byte{0});
}

}  // namespace
}  // namespace minivmm::fuse
