// SPDX-License-Identifier: Apache-2.0
#include "fuse/file_table.h"

#include <string>

#include <cerrno>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/loop_group.h"
#include "block/graph/graph.h"

namespace minivmm::fuse {
namespace {

int name_error(const std::string& name) {
  try {
    check_file_name(name);
    return 0;
  } catch (const base::Error& e) {
    return e.err();
  }
}

TEST(FileName, OrdinaryNamesPass) {
  for (const char* name : {"disk0", "a b", ".hidden", "...", "a,b=c", "\xc3\xa4"}) {
    EXPECT_EQ(name_error(name), 0) << name;
  }
  EXPECT_EQ(name_error(std::string(255, 'x')), 0);
}

TEST(FileName, WhatCannotBeAFileIsRefused) {
  for (const std::string& name :
       {std::string(), std::string("."), std::string(".."), std::string("a/b"), std::string("/"),
        std::string("a\0b", 3), std::string("a\nb"), std::string("\x7f"), std::string(256, 'x')}) {
    EXPECT_EQ(name_error(name), EINVAL) << name;
  }
}

class FileTableTest : public testing::Test {
 protected:
  template <typename Body>
  auto on_loop(Body&& body) {
    return loops_.loop(0).call("test", std::forward<Body>(body));
  }
  void add(const std::string& name) {
    if (!node_made_) graph_.add(block::Options::from_text("driver=null,size=1M,node-name=n"));
    node_made_ = true;
    table_.add(name, graph_.attach("n", "test", block::Permissions::front_end(false)), false);
  }
  void TearDown() override {
    on_loop([&] {
      for (const auto& file : table_.all()) {
        (void)table_.remove(file->name());
        file->close();
      }
      graph_.close();
    });
  }
  base::LoopGroup loops_{1};
  block::Graph graph_;
  FileTable table_;
  bool node_made_ = false;
};

TEST_F(FileTableTest, FindsByNameAndInode) {
  on_loop([&] {
    add("a");
    add("b");
    EXPECT_THROW(add("a"), base::Error);
    const auto a = table_.find(std::string_view("a"));
    ASSERT_TRUE(a);
    EXPECT_EQ(table_.find(a->inode()), a);
    EXPECT_EQ(table_.find(std::string_view("c")), nullptr);
    EXPECT_EQ(table_.find(kRootInode), nullptr) << "the root is no file";
    EXPECT_EQ(table_.next_after(kRootInode), a);
    EXPECT_EQ(table_.next_after(a->inode())->name(), "b");
    EXPECT_EQ(table_.next_after(a->inode() + 1), nullptr);
  });
}

// The kernel may ask about an open file by its number long after the name is gone or another's.
TEST_F(FileTableTest, RemovedFilesStayWhileTheyAreOpen) {
  on_loop([&] {
    add("a");
    const uint64_t inode = table_.find(std::string_view("a"))->inode();
    File* const first = table_.open(inode);
    EXPECT_EQ(table_.open(inode), first);
    const auto removed = table_.remove("a");
    EXPECT_EQ(removed.get(), first);
    EXPECT_EQ(table_.find(std::string_view("a")), nullptr);
    EXPECT_EQ(table_.find(inode), removed);
    EXPECT_EQ(table_.open(inode), nullptr) << "no new opens";
    add("a");
    EXPECT_NE(table_.find(std::string_view("a"))->inode(), inode);
    table_.release(*first);
    EXPECT_EQ(table_.find(inode), removed);
    table_.release(*first);
    EXPECT_EQ(table_.find(inode), nullptr);
    removed->close();
  });
}

}  // namespace
}  // namespace minivmm::fuse
