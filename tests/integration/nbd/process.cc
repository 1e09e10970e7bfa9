// SPDX-License-Identifier: Apache-2.0
#include "process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <iterator>

#include <gtest/gtest.h>

namespace minivmm::nbd {
namespace {

constexpr int kReadyFd = 60;
constexpr int kStartLimit = 30'000;  // ms; sanitizer builds on a loaded machine are slow

int status_of(int wait_status) {
  return WIFEXITED(wait_status) ? WEXITSTATUS(wait_status) : 128 + WTERMSIG(wait_status);
}

}  // namespace

Outcome run(const std::string& command) {
  Outcome out;
  std::FILE* const pipe = ::popen(("timeout 120 bash -c '" + command + "' 2>&1").c_str(), "re");
  if (pipe == nullptr) return out;
  std::array<char, 4096> buffer;
  while (const size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    out.output.append(buffer.data(), n);
  }
  out.status = status_of(::pclose(pipe));
  return out;
}

bool have(const std::string& program) {
  return run("PATH=$PATH:/usr/sbin:/sbin command -v " + program).status == 0;
}

Process::Process(const std::vector<std::string>& arguments, std::string log)
    : log_(std::move(log)) {
  std::vector<char*> argv;
  for (const std::string& each : arguments) argv.push_back(const_cast<char*>(each.c_str()));
  std::string ready = std::to_string(kReadyFd);
  std::string option = "--ready-fd";
  argv.insert(argv.end(), {option.data(), ready.data(), nullptr});
  int pipe[2] = {-1, -1};
  EXPECT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
  const int fd = ::open(log_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  pid_ = ::fork();
  if (pid_ == 0) {
    ::dup2(fd, 1);
    ::dup2(fd, 2);
    ::dup2(pipe[1], kReadyFd);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ::close(fd);
  ::close(pipe[1]);
  pollfd waiting{pipe[0], POLLIN, 0};
  char text[16] = {};
  // Closed without a word: it has ended.
  const bool said = ::poll(&waiting, 1, kStartLimit) == 1 && ::read(pipe[0], text, 6) > 0;
  ::close(pipe[0]);
  EXPECT_TRUE(said) << arguments[0] << " did not get ready: " << output();
}

Process::~Process() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

void Process::signal(int number) const {
  if (pid_ > 0) ::kill(pid_, number);
}

int Process::wait(int seconds) {
  for (int i = 0; i < seconds * 100 && pid_ > 0; ++i) {
    int status = 0;
    if (::waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return status_of(status);
    }
    ::usleep(10'000);
  }
  return -1;
}

std::string Process::output() const {
  std::ifstream file(log_);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace minivmm::nbd
