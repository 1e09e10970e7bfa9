// SPDX-License-Identifier: Apache-2.0
// bare_server: the least that can answer NBD READ and WRITE, as the physical limit to compare a
// server with. A thread per connection; see bare_connection.h for what can be varied.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <csignal>
#include <cstdio>
#include <thread>

#include "args.h"
#include "bare_connection.h"
#include "base/error.h"
#include "nbd_socket.h"

namespace minivmm::bench {
namespace {

constexpr const char* kUsage =
    "usage: bare_server --file=PATH --listen=URI [--receive=block|epoll|ring]\n"
    "    [--io=pread|nowait|ring|mapped|none] [--send=joined|gathered|ring] [--spin-us=N]\n"
    "    [--batch=N]\n"
    "URI: nbd+unix:///?socket=PATH or nbd://HOST:PORT. Serves until it is killed.\n";

template <typename T>
T choose(const Args& args, const char* name, std::initializer_list<std::pair<const char*, T>> map) {
  const std::string given = args.text(name, map.begin()->first);
  for (const auto& [text, value] : map) {
    if (given == text) return value;
  }
  throw base::Error(EINVAL, std::string("--") + name + "=" + given + " is unknown");
}

BareOptions options_of(const Args& args) {
  BareOptions o;
  o.receive = choose<BareReceive>(args, "receive",
                                  {{"block", BareReceive::kBlock},
                                   {"epoll", BareReceive::kEpoll},
                                   {"ring", BareReceive::kRing}});
  o.io = choose<BareIo>(args, "io",
                        {{"pread", BareIo::kPread},
                         {"nowait", BareIo::kNowait},
                         {"ring", BareIo::kRing},
                         {"mapped", BareIo::kMapped},
                         {"none", BareIo::kNone}});
  o.send = choose<BareSend>(args, "send",
                            {{"joined", BareSend::kJoined},
                             {"gathered", BareSend::kGathered},
                             {"ring", BareSend::kRing}});
  if (o.send == BareSend::kRing && o.receive != BareReceive::kRing) {
    throw base::Error(EINVAL, "--send=ring goes with --receive=ring");
  }
  o.spin_us = static_cast<unsigned>(args.number("spin-us", 0));
  o.max_batch = static_cast<unsigned>(args.number("batch", o.max_batch));
  return o;
}

BareFile open_file(const std::string& path, bool map) {
  BareFile file;
  file.fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  struct stat st {};
  if (file.fd < 0 || ::fstat(file.fd, &st) != 0) throw base::errno_error(errno, path);
  file.size = static_cast<std::uint64_t>(st.st_size);
  if (map) {
    void* const p = ::mmap(nullptr, file.size, PROT_READ, MAP_SHARED | MAP_POPULATE, file.fd, 0);
    if (p == MAP_FAILED) throw base::errno_error(errno, path + ": cannot map");
    file.mapped = static_cast<char*>(p);
  }
  return file;
}

void serve_client(base::UniqueFd socket, const BareFile& file, const BareOptions& options) {
  try {
    BareConnection(std::move(socket), file, options).serve();
  } catch (const base::Error& e) {
    std::fprintf(stderr, "bare_server: %s\n", e.what());
  }
}

void run(const Args& args) {
  const BareOptions options = options_of(args);
  const BareFile file = open_file(args.text("file", ""), options.io == BareIo::kMapped);
  const base::UniqueFd listener = listen_at(parse_nbd_uri(args.text("listen", "")));
  for (;;) {
    base::UniqueFd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket) throw base::errno_error(errno, "cannot accept");
    std::thread([s = std::move(socket), &file, &options]() mutable {
      serve_client(std::move(s), file, options);
    }).detach();
  }
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  try {
    const minivmm::bench::Args args(
        argc, argv, {"file", "listen", "receive", "io", "send", "spin-us", "batch", "help"});
    if (args.has("help") || !args.has("file") || !args.has("listen")) {
      std::fputs(minivmm::bench::kUsage, stderr);
      return 2;
    }
    minivmm::bench::run(args);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bare_server: %s\n", e.what());
    return 1;
  }
  return 0;
}
