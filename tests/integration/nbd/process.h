// SPDX-License-Identifier: Apache-2.0
// Programs for tests: one that runs to its end, and a server that runs beside the test.
#pragma once

#include <string>
#include <sys/types.h>

#include <vector>

namespace minivmm::nbd {

struct Outcome {
  int status = -1;  // exit status; 128 + signal
  std::string output;
};

// Runs a shell command; its output is both streams.
Outcome run(const std::string& command);
bool have(const std::string& program);

// A process that is ended with the object, at the latest.
class Process {
 public:
  // Adds --ready-fd to the arguments and returns once the program has written there. Its output
  // goes to `log`.
  Process(const std::vector<std::string>& arguments, std::string log);
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process();

  pid_t pid() const noexcept { return pid_; }
  void signal(int number) const;
  // Waits for its end; the exit status, 128 + signal, or -1 after `seconds`.
  int wait(int seconds);
  std::string output() const;

 private:
  pid_t pid_ = -1;
  const std::string log_;
};

}  // namespace minivmm::nbd
