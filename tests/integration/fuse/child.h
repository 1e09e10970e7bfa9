// SPDX-License-Identifier: Apache-2.0
// Another process with its standard input and output in the test's hands.
#pragma once

#include <string>
#include <sys/types.h>

#include <vector>

#include "base/unique_fd.h"

namespace minivmm::fuse {

class Child {
 public:
  // The program's path, then its arguments. Throws base::Error.
  explicit Child(const std::vector<std::string>& command);
  // Kills it if it still runs.
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  // The next line of its output, without the newline; what is left at the end of it.
  std::string next_line();
  // Reads until a line that begins so; false at the end of the output.
  bool wait_for(const std::string& line);
  // Writes a line and reads one.
  std::string ask(const std::string& line);
  // Exit status, or 1000 + the signal.
  int end(int signal);
  // All that was read.
  const std::string& output() const { return all_; }

 private:
  pid_t pid_ = -1;
  base::UniqueFd input_;
  base::UniqueFd output_;
  bool ended_ = false;
  std::string all_;
};

}  // namespace minivmm::fuse
