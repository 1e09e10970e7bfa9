// SPDX-License-Identifier: Apache-2.0
// minivmm boot
#include <fmt/core.h>

#include "block/graph/options.h"
#include "cli/command.h"
#include "cli/daemon_options.h"
#include "control/daemon.h"
#include "control/specs.h"

namespace minivmm::cli {

namespace po = boost::program_options;

namespace {

constexpr uint64_t kMaxCpus = 254;  // APIC ids of 8 bits

constexpr const char* kUsage =
    "Usage: minivmm boot --disk IMAGE[,...] [--kernel FILE] [--nbd URI] [--fuse DIR] "
    "[--export NODE]\n\n"
    "Runs a guest on disk images. The same nodes can be served over NBD and FUSE meanwhile.\n"
    "Without --kernel the system in the first disk's /boot is started, as its boot loader would.\n"
    "A disk without one gets the built-in probe guest, a small program that exercises its disks:\n"
    "give its jobs with --append 'job=info' (see images/probe/README.md). Ctrl-A x ends a guest on "
    "a\n"
    "terminal. The exit status is the guest's; 124 after a crash, 125 where KVM gave up.\n\n"
    "Examples:\n"
    "  minivmm boot --disk debian.qcow2 --memory 1G\n"
    "  minivmm boot --disk disk.qcow2 --append 'job=info'\n"
    "  minivmm boot --disk overlay.qcow2,id=disk0 --nbd 'nbd+unix:///?socket=m.sock' \\\n"
    "      --fuse /mnt/disks --export disk0,writable --append 'job=shell'\n\n";

po::options_description guest_options() {
  po::options_description out("Guest", 100, 60);
  // clang-format off
  out.add_options()
    ("kernel", po::value<std::string>()->value_name("FILE"),
     "an ELF or bzImage kernel; otherwise the one in the first disk's /boot, and without any the "
     "built-in probe guest")
    ("probe", "run the probe guest, whatever is on the disk")
    ("initrd", po::value<std::string>()->value_name("FILE"), "an initial ramdisk")
    ("append", po::value<std::string>()->value_name("TEXT"), "the kernel's command line")
    ("memory", po::value<std::string>()->default_value("256M")->value_name("SIZE"), "guest RAM")
    ("cpus", po::value<std::string>()->default_value("1")->value_name("N"), "virtual CPUs")
    ("shared-memory", "guest RAM in a memfd")
    ("hugetlb", po::value<std::string>()->value_name("SIZE"),
     "guest RAM in reserved huge pages of 2M or 1G (see /proc/sys/vm/nr_hugepages)")
    ("prealloc", "take all guest RAM from the host at the start")
    ("devices", po::value<std::string>()->default_value("auto")->value_name("HOW"),
     "how the kernel is told of its devices: acpi, command-line, or auto for what it knows")
    ("no-rng", "no virtio entropy device for a kernel")
    ("on-reboot", po::value<std::string>()->default_value("exit")->value_name("WHAT"),
     "what a reset by the guest does: exit, or restart the guest with all else as it is")
    ("pin", po::value<std::vector<std::string>>()->composing()->value_name("THREAD=CPUS"),
     "host processors for a thread: vcpu0=2, io0=0-1,4")
    ("serial", po::value<std::string>()->default_value("stdio")->value_name("WHERE"),
     "the guest's serial port: stdio, none, pty, file:PATH, or unix:PATH (a socket)");
  // clang-format on
  return out;
}

}  // namespace

int run_boot(const std::vector<std::string>& arguments) {
  po::options_description options;
  options.add(guest_options()).add(graph_options()).add(front_end_options()).add(process_options());
  po::variables_map values;
  if (!parse(arguments, kUsage, options, values)) return 0;
  control::Config config = make_config(values);
  const auto text = [&](const char* name) {
    return values.count(name) != 0 ? values[name].as<std::string>() : std::string();
  };
  control::Boot boot;
  boot.kernel = text("kernel");
  boot.probe = values.count("probe") != 0;
  boot.initrd = text("initrd");
  boot.append = text("append");
  boot.memory_bytes = block::parse_size(text("memory"), "memory");
  boot.cpus = static_cast<unsigned>(number_value(values, "cpus", 1, kMaxCpus));
  boot.shared_memory = values.count("shared-memory") != 0;
  if (values.count("hugetlb") != 0)
    boot.huge_page_bytes = block::parse_size(text("hugetlb"), "hugetlb");
  boot.prealloc = values.count("prealloc") != 0;
  boot.devices = text("devices");
  boot.rng = values.count("no-rng") == 0;
  boot.serial = text("serial");
  const std::string on_reboot = text("on-reboot");
  if (on_reboot != "exit" && on_reboot != "restart") {
    throw UsageError{fmt::format("--on-reboot {}: exit or restart", on_reboot)};
  }
  boot.restart_on_reboot = on_reboot == "restart";
  if (values.count("pin") != 0) {
    for (const auto& pin : values["pin"].as<std::vector<std::string>>()) {
      auto [thread, processors] = control::parse_pin(pin);
      boot.processors[thread] = std::move(processors);
    }
  }
  config.boot = std::move(boot);
  return control::Daemon(std::move(config)).run();
}

}  // namespace minivmm::cli
