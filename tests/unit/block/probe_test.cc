// SPDX-License-Identifier: Apache-2.0
// Which format first bytes look like.
#include "block/formats/probe.h"

#include <string>

#include <span>

#include <gtest/gtest.h>

namespace minivmm::block {
namespace {

using namespace std::string_literals;

std::string_view probe(const std::string& bytes) {
  return probe_format(std::as_bytes(std::span(bytes)));
}

TEST(Probe, SignaturesAreRecognised) {
  EXPECT_EQ(probe("QFI\xfb\0\0\0\2...."s), "qcow2");
  EXPECT_EQ(probe("QFI\xfb\0\0\0\3...."s), "qcow2");
  EXPECT_EQ(probe("QFI\xfb\0\0\0\1...."s), "qcow");  // a version that no driver here reads
  EXPECT_EQ(probe("QED\0"s), "qed");
  EXPECT_EQ(probe("KDMV"), "vmdk");
  EXPECT_EQ(probe("vhdxfile"), "vhdx");
  EXPECT_EQ(probe("LUKS\xba\xbe\0\1"s), "luks");
  EXPECT_EQ(probe(std::string(64, ' ').append("\x7f\x10\xda\xbe")), "vdi");
}

TEST(Probe, EverythingElseIsRaw) {
  EXPECT_EQ(probe(""), "raw");
  EXPECT_EQ(probe("QFI"), "raw");
  EXPECT_EQ(probe(std::string(512, '\0')), "raw");
  EXPECT_EQ(probe(" QFI\xfb\0\0\0\3"s), "raw");
  EXPECT_EQ(probe(std::string(64, ' ').append("\x7f\x10\xda")), "raw");
}

}  // namespace
}  // namespace minivmm::block
