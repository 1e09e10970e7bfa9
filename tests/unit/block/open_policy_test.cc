// SPDX-License-Identifier: Apache-2.0
// What a name that an image records may lead to.
#include "block/graph/open_policy.h"

#include <sys/stat.h>

#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/unit/block/graph_fixture.h"
#include "tests/unit/block/temp_directory.h"

namespace minivmm::block {
namespace {

using testing::HasSubstr;

class OpenPolicyTest : public testing::Test {
 protected:
  std::string refusal(const std::string& reference, const std::string& format = "raw") {
    return error_text([&] { backing_options(policy_, image_, reference, format); });
  }
  TempDirectory home_;
  TempDirectory elsewhere_;
  const std::string image_ = home_.write("top.qcow2", "");
  OpenPolicy policy_;
};

TEST_F(OpenPolicyTest, ANeighbourWithAFormatIsOpenedReadOnly) {
  home_.write("base", "");
  Options options = backing_options(policy_, image_, "base", "raw");
  EXPECT_EQ(options.take_string("driver"), "raw");
  EXPECT_EQ(options.take_string("read-only"), "on");
  EXPECT_EQ(options.take_string("file.filename"), home_ / "base");
  std::filesystem::create_directory(home_ / "below");
  home_.write("below/base", "");
  EXPECT_EQ(refusal("below/base"), "");
  EXPECT_EQ(refusal(home_ / "base"), "");
}

TEST_F(OpenPolicyTest, NothingElseIsFollowed) {
  home_.write("base", "");
  const std::string secret = elsewhere_.write("secret", "");
  std::filesystem::create_symlink(secret, home_ / "link");
  ASSERT_EQ(::mkfifo((home_ / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(refusal(secret), HasSubstr("lies outside the image's own directory"));
  EXPECT_THAT(refusal("link"), HasSubstr("lies outside"));
  EXPECT_THAT(
      refusal("../" + std::filesystem::path(secret).parent_path().filename().string() + "/secret"),
      HasSubstr("lies outside"));
  EXPECT_THAT(refusal("fifo"), HasSubstr("is not a regular file"));
  EXPECT_THAT(refusal("."), HasSubstr("is not a regular file"));
  EXPECT_THAT(refusal("json:{\"driver\":\"file\"}"), HasSubstr("is not a plain file name"));
  EXPECT_THAT(refusal("nbd://host/x"), HasSubstr("is not a plain file name"));
  EXPECT_THAT(refusal("none"), HasSubstr("not found"));
  EXPECT_THAT(refusal("base", ""), HasSubstr("without a format"));
  policy_.follow_references = false;
  EXPECT_THAT(refusal("base"), HasSubstr("not followed here"));
}

// A directory that only begins alike is another one.
TEST_F(OpenPolicyTest, BackingRootsAllowWhatLiesBelowThem) {
  const std::string base = elsewhere_.write("base", "");
  const std::string root = std::filesystem::path(base).parent_path();
  policy_.backing_roots = {root.substr(0, root.size() - 1)};
  EXPECT_THAT(refusal(base), HasSubstr("--backing-root " + root));
  policy_.backing_roots = {root};
  EXPECT_EQ(refusal(base), "");
}

// Only the user chooses filters and protocols.
TEST_F(OpenPolicyTest, AFormatThatIsNoImageFormatIsRefused) {
  home_.write("base", "");
  for (const char* format : {"fault", "log-writes", "null", "file", "host_device", "vmdk"}) {
    EXPECT_THAT(refusal("base", format), HasSubstr("is not an image format")) << format;
  }
}

}  // namespace
}  // namespace minivmm::block
