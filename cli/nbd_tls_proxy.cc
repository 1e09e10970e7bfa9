// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_tls_proxy.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <climits>
#include <csignal>
#include <cstring>
#include <memory>
#include <utility>

#include <dirent.h>

#include "base/call_filter.h"
#include "base/error.h"
#include "cli/nbd_tls_pump.h"

namespace minivmm::cli {
namespace {

using base::UniqueFd;
using Pumps = std::vector<std::unique_ptr<NbdTlsPump>>;
using Clock = NbdTlsPump::Clock;

// A batch of requests or replies goes through in one turn. The kernel allows less where
// net.core.wmem_max says so.
constexpr int kSendBuffer = 1 << 20;

// Milliseconds until one of them has to be looked at, whatever happens; -1: none.
int time_left(const Pumps& pumps) {
  std::optional<Clock::time_point> first;
  for (const auto& pump : pumps) {
    if (pump->has_more()) return 0;
    const auto deadline = pump->deadline();
    if (deadline && (!first || *deadline < *first)) first = deadline;
  }
  if (!first) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*first - Clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, INT_MAX));
}

void pump_all(Pumps& pumps) {
  std::vector<pollfd> waited;
  while (!pumps.empty()) {
    waited.resize(2 * pumps.size());
    for (size_t i = 0; i < pumps.size(); ++i) {
      pumps[i]->say_what_to_poll(waited[2 * i], waited[2 * i + 1]);
    }
    if (::poll(waited.data(), waited.size(), time_left(pumps)) < 0) {
      if (errno != EINTR) return;
      for (pollfd& each : waited) each.revents = 0;
    }
    for (size_t i = 0; i < pumps.size(); ++i) {
      pumps[i]->work(waited[2 * i].revents, waited[2 * i + 1].revents);
    }
    std::erase_if(pumps, [](const auto& pump) { return pump->has_ended(); });
  }
}

// What this process inherited and has no use for.
void close_others(const std::vector<int>& kept) {
  DIR* const list = ::opendir("/proc/self/fd");
  if (list == nullptr) return;
  std::vector<int> others;
  while (const dirent* const entry = ::readdir(list)) {
    int fd = -1;
    const char* const end = entry->d_name + std::strlen(entry->d_name);
    if (std::from_chars(entry->d_name, end, fd).ec != std::errc()) continue;
    const bool keep = fd <= STDERR_FILENO || fd == ::dirfd(list) ||
                      std::find(kept.begin(), kept.end(), fd) != kept.end();
    if (!keep) others.push_back(fd);
  }
  ::closedir(list);
  for (const int fd : others) ::close(fd);
}

void leave_the_terminal(bool keeps_errors) {
  ::setsid();
  (void)!::chdir("/");
  const UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  ::dup2(nothing.get(), STDIN_FILENO);
  ::dup2(nothing.get(), STDOUT_FILENO);
  if (!keeps_errors) ::dup2(nothing.get(), STDERR_FILENO);
}

// The kernel may write to the device because it needs memory: whoever does that for it must not
// wait for memory. Not everybody may ask for that, nor does every kernel know it.
void never_wait_for_writeback() {
#ifndef PR_SET_IO_FLUSHER
  constexpr int PR_SET_IO_FLUSHER = 57;
#endif
  (void)::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
  (void)::mlockall(MCL_CURRENT | MCL_FUTURE);
}

[[noreturn]] void be_the_proxy(Pumps& pumps, const std::vector<int>& sockets, bool keeps_errors) {
  int status = 0;
  try {
    (void)::prctl(PR_SET_NAME, "minivmm-tls");
    (void)std::signal(SIGPIPE, SIG_IGN);
    leave_the_terminal(keeps_errors);
    close_others(sockets);
    never_wait_for_writeback();
    base::CallFilter()
        .allow({SYS_recvfrom, SYS_recvmsg, SYS_sendto, SYS_sendmsg, SYS_shutdown, SYS_close})
        .apply("nbd-tls");
    pump_all(pumps);
  } catch (...) {
    status = 1;
  }
  // Not the rest of what the parent does.
  ::_exit(status);
}

}  // namespace

std::optional<pid_t> start_nbd_tls_proxy(std::vector<NbdAttachment>& attached, bool keeps_errors) {
  if (attached.empty() || !attached[0].tls) return std::nullopt;
  Pumps pumps;
  std::vector<int> sockets;
  for (NbdAttachment& each : attached) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
      throw base::errno_error(errno, "a pair of sockets");
    }
    UniqueFd theirs(pair[0]);
    UniqueFd ours(pair[1]);
    for (const int end : pair) {
      (void)::setsockopt(end, SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof kSendBuffer);
    }
    sockets.insert(sockets.end(), {ours.get(), each.socket.get()});
    pumps.push_back(std::make_unique<NbdTlsPump>(
        std::move(ours), std::exchange(each.socket, std::move(theirs)), std::move(each.tls)));
  }
  const pid_t child = ::fork();
  if (child < 0) throw base::errno_error(errno, "a process for TLS");
  if (child == 0) {
    // The kernel's ends: while they are open here, the end of the device would not be seen.
    attached.clear();
    be_the_proxy(pumps, sockets, keeps_errors);
  }
  return child;
}

}  // namespace minivmm::cli
