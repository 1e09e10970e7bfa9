// SPDX-License-Identifier: Apache-2.0
#include <string>

#include <gtest/gtest.h>

#include "base/error.h"
#include "cli/image_create_options.h"

namespace minivmm::cli {
namespace {

std::string error_of(const std::string& format, const std::string& text) {
  try {
    CreateOptionList(format).parse(text);
  } catch (const base::Error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(CreateOptionList, PrintsDefaultsInQemuImgsOrder) {
  CreateOptionList list("qcow2");
  list.parse("size=1M,refcount_bits=08,cluster_size=4k");
  EXPECT_EQ(list.formatted(),
            "cluster_size=4096 extended_l2=off compression_type=zlib size=1048576 "
            "lazy_refcounts=off refcount_bits=8");
}

TEST(CreateOptionList, CommasInValuesAreDoubledBothWays) {
  CreateOptionList list("qcow2");
  list.parse("backing_file=a,,b,backing_fmt=raw");
  EXPECT_EQ(list.get("backing_file"), "a,b");
  EXPECT_NE(list.formatted().find("backing_file=a,,b "), std::string::npos);
}

TEST(CreateOptionList, TheLastValueCounts) {
  CreateOptionList list("qcow2");
  list.parse("cluster_size=64k");
  list.parse("cluster_size=512");
  EXPECT_EQ(list.get("cluster_size"), "512");
  block::Options options = list.for_driver();
  EXPECT_EQ(options.take_size("cluster_size"), 512U);
  EXPECT_NO_THROW(options.finish("test"));
}

TEST(CreateOptionList, RefusesWhatItCannotDo) {
  EXPECT_EQ(error_of("qcow2", "encrypt.format=luks"), "accepted");
  EXPECT_EQ(error_of("raw", "compat=1.1"), "Invalid parameter 'compat'");
  EXPECT_EQ(error_of("qcow2", "lazy_refcounts=perhaps"),
            "Parameter 'lazy_refcounts' expects 'on' or 'off'");
  EXPECT_EQ(error_of("qcow2", "refcount_bits=1k"), "Parameter 'refcount_bits' expects a number");
  EXPECT_EQ(error_of("qcow2", ""), "Invalid option list: ");
  EXPECT_EQ(error_of("qcow2", "lazy_refcounts=on,"), "Invalid option list: lazy_refcounts=on,");
  EXPECT_NE(error_of("qcow2", "cluster_size").find("has no value"), std::string::npos);
  EXPECT_THROW(CreateOptionList("vmdk"), base::Error);
}

TEST(CreateOptionList, WhatIsOfTheFileDoesNotReachTheDriver) {
  // It does not know this option and would refuse it.
  CreateOptionList list("qcow2");
  list.parse("nocow=off");
  EXPECT_TRUE(list.for_driver().empty());
}

TEST(CreateOptionList, EncryptionHasTwoNames) {
  const std::pair<const char*, bool> cases[] = {
      {"encryption=on", true}, {"encryption=off", false}, {"encrypt.format=aes", true}};
  for (const auto& [text, encrypted] : cases) {
    CreateOptionList list("qcow2");
    list.parse(text);
    EXPECT_EQ(list.encrypted(), encrypted) << text;
  }
  EXPECT_FALSE(CreateOptionList("raw").encrypted());
}

TEST(CreateOptionList, HelpIsAskedForAnywhereInTheList) {
  EXPECT_TRUE(CreateOptionList::asks_for_help("help"));
  EXPECT_TRUE(CreateOptionList::asks_for_help("?"));
  EXPECT_TRUE(CreateOptionList::asks_for_help("cluster_size=4k,help"));
  EXPECT_FALSE(CreateOptionList::asks_for_help("backing_file=help"));
  EXPECT_FALSE(CreateOptionList::asks_for_help("a,,help"));
}

}  // namespace
}  // namespace minivmm::cli
