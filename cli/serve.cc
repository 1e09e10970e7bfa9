// SPDX-License-Identifier: Apache-2.0
// minivmm serve
#include <cerrno>

#include "base/error.h"
#include "cli/command.h"
#include "cli/daemon_options.h"
#include "control/daemon.h"

namespace minivmm::cli {

namespace po = boost::program_options;

namespace {

constexpr const char* kUsage =
    "Usage: minivmm serve --disk IMAGE[,...] [--nbd URI] [--fuse DIR] --export NODE[,...]\n\n"
    "Serves disk images over NBD and FUSE at the same time until it is told to end (SIGINT,\n"
    "SIGTERM). SIGUSR1 prints the live state.\n\n"
    "Examples:\n"
    "  minivmm serve --disk disk.qcow2,id=disk0 --nbd nbd://127.0.0.1 --export disk0\n"
    "  minivmm serve --disk disk.qcow2 --fuse /mnt/disks --export disk0,writable\n"
    "  minivmm serve --blockdev driver=raw,node-name=part,offset=1M,file.driver=file,"
    "file.filename=sd.img \\\n"
    "      --nbd 'nbd+unix:///?socket=part.sock' --export part,writable\n\n";

po::options_description serve_options() {
  po::options_description out("Service", 100, 60);
  out.add_options()("once", "end when the last NBD client has left")(
      "persistent", "stay when the last NBD client has left, which is so if nothing is said");
  return out;
}

}  // namespace

int run_serve(const std::vector<std::string>& arguments) {
  po::options_description options;
  options.add(serve_options()).add(graph_options()).add(front_end_options()).add(process_options());
  po::variables_map values;
  if (!parse(arguments, kUsage, options, values)) return 0;
  control::Config config = make_config(values);
  if (config.exports.empty() && config.control_socket.empty()) {
    throw UsageError{
        "nothing to serve: give --disk IMAGE, --export NODE, and --nbd or --fuse; or --qmp "
        "unix:PATH, and say what to serve later"};
  }
  if (values.count("once") != 0 && values.count("persistent") != 0) {
    throw UsageError{"--once and --persistent exclude each other"};
  }
  config.once = values.count("once") != 0;
  if (config.once && config.nbd.empty()) throw UsageError{"--once goes with --nbd"};
  return control::Daemon(std::move(config)).run();
}

}  // namespace minivmm::cli
