// SPDX-License-Identifier: Apache-2.0
// Serves nodes as files of a mount, until SIGTERM or SIGINT: the process that the tests kill.
//     fuse_server MOUNTPOINT LOOPS [+]NAME=NODE-OPTIONS...     (+: writable)
// Prints "ready" once the files can be used, and what stop() had to say.
#include <pthread.h>
#include <signal.h>
#include <string>
#include <string_view>
#include <sys/prctl.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "base/error.h"
#include "block/graph/graph.h"
#include "fuse/mount.h"

namespace minivmm {
namespace {

struct Export {
  std::string name;
  std::string options;
  bool writable = false;
};

Export parse_export(std::string_view text) {
  Export out;
  if (text.starts_with('+')) {
    out.writable = true;
    text.remove_prefix(1);
  }
  const size_t equals = text.find('=');
  if (equals == std::string_view::npos) throw base::Error(EINVAL, "export without '='");
  out.name = text.substr(0, equals);
  out.options = text.substr(equals + 1);
  return out;
}

int serve(const std::string& mountpoint, unsigned loop_count, const std::vector<Export>& exports,
          const sigset_t& signals) {
  base::LoopGroup loops(loop_count);
  block::Graph graph;
  fuse::Mount mount(loops, mountpoint);
  loops.loop(0).call("start", [&] {
    for (const Export& e : exports) {
      block::Options options = block::Options::from_text(e.options);
      options.set("node-name", e.name);
      if (!e.writable) options.set("read-only", "on");
      graph.add(std::move(options));
      mount.add_file(e.name,
                     graph.attach(e.name, "FUSE file '" + e.name + "'",
                                  block::Permissions::front_end(e.writable)),
                     {.writable = e.writable});
    }
    mount.start();
  });
  std::puts("ready");
  std::fflush(stdout);
  int signal = 0;
  (void)::sigwait(&signals, &signal);
  std::vector<std::string> troubles;
  loops.loop(0).call("stop", [&] {
    troubles = mount.stop(std::chrono::seconds(5));
    graph.close();
  });
  for (const std::string& trouble : troubles) std::printf("trouble: %s\n", trouble.c_str());
  return troubles.empty() ? 0 : 1;
}

}  // namespace
}  // namespace minivmm

int main(int argc, char** argv) {
  using namespace minivmm;
  if (argc < 4) {
    std::fprintf(stderr, "usage: fuse_server MOUNTPOINT LOOPS [+]NAME=NODE-OPTIONS...\n");
    return 2;
  }
  // A test that dies takes its server along.
  (void)::prctl(PR_SET_PDEATHSIG, SIGTERM);
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGINT);
  (void)::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  try {
    std::vector<Export> exports;
    for (int i = 3; i < argc; ++i) exports.push_back(parse_export(argv[i]));
    return serve(argv[1], static_cast<unsigned>(std::atoi(argv[2])), exports, signals);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "fuse_server: %s\n", e.what());
    return 1;
  }
}
