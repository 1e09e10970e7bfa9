// SPDX-License-Identifier: Apache-2.0
// nbd_serve: an NBD server over any nodes, for tests against other programs and for measuring.
//
//   nbd_serve [--loops=N] [--epoll] [--remote] --listen=URI... [-w] NAME=OPTIONS...
//
// OPTIONS describe a node in dotted keys ("driver=file,filename=a.raw"); -w makes the exports that
// follow it writable. Prints a URI a line for each listener and export, then "ready". Serves until
// SIGTERM or SIGINT; SIGUSR1 prints the live state. Exit status 1 if something did not end well.
#include <signal.h>
#include <string>
#include <string_view>

#include <cstdio>
#include <exception>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "base/loop_group.h"
#include "block/graph/graph.h"
#include "nbd-server/server.h"

namespace minivmm {
namespace {

struct ExportArgument {
  std::string name;
  std::string options;
  bool writable;
};

struct Arguments {
  unsigned loops = 1;
  base::BackendChoice backend = base::BackendChoice::kAuto;
  bool remote = false;
  std::vector<std::string> listen;
  std::vector<ExportArgument> exports;
};

Arguments parse(int argc, char** argv) {
  Arguments out;
  bool writable = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg = argv[i];
    if (arg.starts_with("--loops=")) {
      out.loops = static_cast<unsigned>(std::stoul(std::string(arg.substr(8))));
    } else if (arg == "--epoll") {
      out.backend = base::BackendChoice::kEpoll;
    } else if (arg == "--remote") {
      out.remote = true;
    } else if (arg == "--debug") {
      base::set_log_level(base::LogLevel::kDebug);
    } else if (arg.starts_with("--listen=")) {
      out.listen.emplace_back(arg.substr(9));
    } else if (arg == "-w") {
      writable = true;
    } else if (const size_t at = arg.find('='); at != arg.npos && !arg.starts_with('-')) {
      out.exports.push_back(
          {std::string(arg.substr(0, at)), std::string(arg.substr(at + 1)), writable});
    } else {
      throw base::Error(EINVAL, std::string(arg) + ": not an argument of nbd_serve");
    }
  }
  return out;
}

void print(const std::vector<std::string>& lines) {
  for (const std::string& line : lines) std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

// Returns true if everything ended well.
bool serve(const Arguments& arguments, const sigset_t& signals) {
  base::LoopGroup loops(arguments.loops, arguments.backend);
  block::Graph graph;
  nbd::Server server(loops);
  base::EventLoop& loop = loops.loop(0);
  loop.call("start", [&] {
    for (const ExportArgument& each : arguments.exports) {
      block::Options options = block::Options::from_keys(each.options);
      options.set("node-name", "node-" + each.name);
      if (!each.writable) options.set("read-only", "on");
      graph.add(std::move(options));
      server.add_export(each.name,
                        graph.attach("node-" + each.name, "NBD export '" + each.name + "'",
                                     block::Permissions::front_end(each.writable)),
                        {.description = "export of a test", .writable = each.writable});
    }
    for (const std::string& uri : arguments.listen) {
      server.listen({.uri = uri, .fd = {}, .allow_remote = arguments.remote});
    }
  });
  print(server.uris());
  print({"ready"});
  for (;;) {
    int signal = 0;
    if (::sigwait(&signals, &signal) != 0) continue;
    if (signal != SIGUSR1) break;
    print(server.describe());
  }
  std::vector<std::string> unfinished;
  loop.call("stop", [&] {
    unfinished = server.stop(base::Clock::now() + std::chrono::seconds(3));
    graph.close();
  });
  print(unfinished);
  return unfinished.empty();
}

}  // namespace
}  // namespace minivmm

int main(int argc, char** argv) {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) ::sigaddset(&signals, signal);
  // Before any thread is made, so that all inherit it.
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  try {
    return minivmm::serve(minivmm::parse(argc, argv), signals) ? 0 : 1;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "nbd_serve: %s\n", e.what());
    return 1;
  }
}
