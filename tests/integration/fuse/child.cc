// SPDX-License-Identifier: Apache-2.0
#include "child.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include <spawn.h>

#include "base/error.h"

namespace minivmm::fuse {
namespace {

struct Pipe {
  Pipe() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw base::errno_error(errno, "pipe");
    read.reset(ends[0]);
    write.reset(ends[1]);
  }
  base::UniqueFd read;
  base::UniqueFd write;
};

}  // namespace

Child::Child(const std::vector<std::string>& command) {
  Pipe in;
  Pipe out;
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in.read.get(), 0);
  ::posix_spawn_file_actions_adddup2(&actions, out.write.get(), 1);
  ::posix_spawn_file_actions_adddup2(&actions, out.write.get(), 2);
  const int error = ::posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) throw base::errno_error(error, command[0]);
  input_ = std::move(in.write);
  output_ = std::move(out.read);
}

Child::~Child() {
  if (pid_ > 0) (void)end(SIGKILL);
}

std::string Child::next_line() {
  std::string line;
  char c = 0;
  while (::read(output_.get(), &c, 1) == 1) {
    all_ += c;
    if (c == '\n') return line;
    line += c;
  }
  ended_ = true;
  return line;
}

bool Child::wait_for(const std::string& line) {
  while (!ended_) {
    if (next_line().starts_with(line)) return true;
  }
  return false;
}

std::string Child::ask(const std::string& line) {
  const std::string whole = line + "\n";
  if (::write(input_.get(), whole.data(), whole.size()) < 0) return "nobody listens";
  return next_line();
}

int Child::end(int signal) {
  ::kill(pid_, signal);
  int status = 0;
  (void)::waitpid(pid_, &status, 0);
  pid_ = -1;
  while (!ended_) (void)next_line();
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

}  // namespace minivmm::fuse
