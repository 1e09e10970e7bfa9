// SPDX-License-Identifier: Apache-2.0
// What users type for a control command, as the message that is sent.
#include "cli/control_words.h"

#include <string>

#include <vector>

#include <gtest/gtest.h>

#include "base/error.h"

namespace minivmm::cli {
namespace {

std::string message(const std::vector<std::string>& words) {
  try {
    return control_message(words).dump();
  } catch (const base::Error& e) {
    return e.what();
  }
}

TEST(ControlWords, KeysAndValues) {
  EXPECT_EQ(message({"query-status"}), R"({"execute":"query-status"})");
  EXPECT_EQ(message({"blockdev-add", "driver=qcow2", "node-name=d", "file.driver=file",
                     "file.filename=a=b.qcow2", "read-only=true"}),
            R"({"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"d",)"
            R"("file":{"driver":"file","filename":"a=b.qcow2"},"read-only":true}})");
}

TEST(ControlWords, TheCommandSaysWhatAValueIs) {
  EXPECT_EQ(message({"block_resize", "node-name=7", "size=1G"}),
            R"({"execute":"block_resize","arguments":{"node-name":"7","size":1073741824}})");
  EXPECT_EQ(message({"block-export-add", "writable=on", "allow=O=Example,CN=alice"}),
            R"({"execute":"block-export-add","arguments":{"writable":true,)"
            R"("allow":["O=Example,CN=alice"]}})");
  EXPECT_EQ(message({"block-dirty-bitmap-merge", "bitmaps=[\"a\",\"b\"]"}),
            R"({"execute":"block-dirty-bitmap-merge","arguments":{"bitmaps":["a","b"]}})");
  // One that is not known here may be known there.
  EXPECT_EQ(message({"x-thing", "a=1", "b=on", "c={\"d\":null}", "e="}),
            R"({"execute":"x-thing","arguments":{"a":1,"b":"on","c":{"d":null},"e":""}})");
}

TEST(ControlWords, Json) {
  EXPECT_EQ(message({"quit", R"({"a": 1})"}), R"({"execute":"quit","arguments":{"a":1}})");
  EXPECT_EQ(message({R"({"execute": "quit", "id": 1})"}), R"({"execute":"quit","id":1})");
  EXPECT_EQ(message({"{nope"}), "no JSON object: {nope");
  EXPECT_EQ(message({"quit", "{nope"}), "no JSON object: {nope");
}

TEST(ControlWords, WhatIsWrong) {
  EXPECT_NE(message({"quit", "now"}).find("key=value is expected"), std::string::npos);
  EXPECT_NE(message({"quit", "=1"}).find("key=value is expected"), std::string::npos);
  EXPECT_NE(message({"x", "a=1", "a=2"}).find("given twice"), std::string::npos);
  EXPECT_NE(message({"x", "a=1", "a.b=2"}).find("has a value already"), std::string::npos);
  EXPECT_NE(message({"block_resize", "size=big"}).find("big"), std::string::npos);
  EXPECT_NE(message({}).find("a command is expected"), std::string::npos);
}

TEST(ControlWords, Lines) {
  using Words = std::vector<std::string>;
  EXPECT_EQ(control_line_words("  quit\r"), Words{"quit"});
  EXPECT_EQ(control_line_words(R"(a 'b c'="d \" e" f\ g '')"),
            (Words{"a", "b c=d \" e", "f g", ""}));
  EXPECT_EQ(control_line_words(R"( {"execute": "a b"})"), Words{R"({"execute": "a b"})"});
  EXPECT_EQ(control_line_words(" \t"), Words{});
  EXPECT_THROW(control_line_words("a 'b"), base::Error);
}

TEST(ControlWords, TheListNamesEveryCommandOnce) {
  const std::string list = control_command_list();
  EXPECT_NE(list.find("\n  block_resize [device=TEXT] [node-name=TEXT] size=NUMBER\n"),
            std::string::npos)
      << list;
  EXPECT_NE(list.find("\n  block-export-del id=TEXT [mode=safe|hard]\n"), std::string::npos);
}

}  // namespace
}  // namespace minivmm::cli
