// SPDX-License-Identifier: Apache-2.0
#include "control/specs.h"

#include <fcntl.h>
#include <string>
#include <unistd.h>

#include <cerrno>

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "control/readiness.h"

namespace minivmm::control {
namespace {

// Every way to say yes: attached writable, the read-only node would be refused to the guest.
TEST(Specs, ADescribedDiskIsReadOnlyHoweverThatIsSaid) {
  for (const char* yes : {"on", "yes", "true", "y"}) {
    const Disk disk = parse_disk("driver=null,size=1M,read-only=" + std::string(yes), 0);
    EXPECT_TRUE(disk.read_only) << yes;
    EXPECT_TRUE(disk.node.has("read-only"));
  }
  EXPECT_TRUE(parse_disk(R"({"driver": "null", "read-only": true})", 0).read_only);
  EXPECT_FALSE(parse_disk("driver=null,read-only=off", 0).read_only);
  EXPECT_FALSE(parse_disk("driver=null", 0).read_only);
  EXPECT_THROW(parse_disk("driver=null,read-only=perhaps", 0), base::Error);
}

TEST(Specs, AnExportSaysWhetherItNamedItsFrontEnds) {
  const Export all = parse_export("disk0,writable");
  EXPECT_TRUE(all.every_front_end && all.nbd && all.fuse);
  const Export both = parse_export("disk0,nbd,fuse");
  EXPECT_TRUE(!both.every_front_end && both.nbd && both.fuse);
  const Export one = parse_export("disk0,fuse");
  EXPECT_TRUE(!one.every_front_end && !one.nbd && one.fuse);
}

TEST(GivenFd, MustBeOpenAndIsKeptFromChildren) {
  int fds[2];
  ASSERT_EQ(::pipe(fds), 0);
  const base::UniqueFd read(fds[0]);
  base::UniqueFd write(fds[1]);
  take_given_fd("--ready-fd", write.get());
  EXPECT_EQ(::fcntl(write.get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  const int number = write.get();
  notify_ready_fd(write.release());
  char text[16] = {};
  EXPECT_EQ(::read(read.get(), text, sizeof text), 6);
  EXPECT_EQ(std::string(text), "READY\n");
  EXPECT_EQ(::read(read.get(), text, sizeof text), 0) << "it was not closed";
  try {
    take_given_fd("--ready-fd 7", number);
    FAIL();
  } catch (const base::Error& error) {
    EXPECT_EQ(error.err(), EBADF);
    EXPECT_NE(std::string(error.what()).find("--ready-fd 7"), std::string::npos);
  }
}

}  // namespace
}  // namespace minivmm::control
