// SPDX-License-Identifier: Apache-2.0
#include "cli/host_items.h"

#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <string_view>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <sstream>

#include <fmt/core.h>

#include "base/error.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "vmm/host_probe.h"

namespace minivmm::cli {
namespace {

// The first line; nullopt where the file cannot be read.
std::optional<std::string> first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!std::getline(file, line)) return std::nullopt;
  return line;
}

// The number in "key:   123 kB" of a file of such lines.
std::optional<uint64_t> number_after(const std::string& path, std::string_view key, int base = 10) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != ':') continue;
    return std::strtoull(line.c_str() + key.size() + 1, nullptr, base);
  }
  return std::nullopt;
}

std::string kernel_release() {
  utsname names{};
  return ::uname(&names) == 0 ? names.release : "";
}

bool has_line(const std::string& path, std::string_view wanted) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t end = line.find_last_not_of(" \t");
    if (end != std::string::npos && line.substr(0, end + 1) == wanted) return true;
  }
  return false;
}

std::string find_program(const std::string& name) {
  const char* path = std::getenv("PATH");
  std::istringstream folders(path != nullptr ? path : "/usr/bin:/bin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    folder.append("/").append(name);
    if (::access(folder.c_str(), X_OK) == 0) return folder;
  }
  return {};
}

bool may_mount() {
  const auto capabilities = number_after("/proc/self/status", "CapEff", 16);
  return capabilities && (*capabilities >> CAP_SYS_ADMIN & 1) != 0;
}

}  // namespace

HostItem check_kernel() {
  // Parallel direct writes of FUSE files (6.2) are the youngest thing that is used where it is.
  constexpr int kOldest[] = {5, 10};
  const std::string release = kernel_release();
  HostItem item{.name = "kernel", .text = "Linux " + release, .advice = {}};
  int major = 0;
  int minor = 0;
  if (std::sscanf(release.c_str(), "%d.%d", &major, &minor) == 2 &&
      (major < kOldest[0] || (major == kOldest[0] && minor < kOldest[1]))) {
    item.state = HostState::kLimited;
    item.advice = fmt::format("older than {}.{}, which is not tested", kOldest[0], kOldest[1]);
  }
  return item;
}

HostItem check_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int usable = ::sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const long online = ::sysconf(_SC_NPROCESSORS_ONLN);
  HostItem item{.name = "processors",
                .text = fmt::format("{} usable of {} online", usable, online),
                .advice = {}};
  if (usable < 2) {
    item.state = HostState::kLimited;
    item.advice = "a guest and the I/O of its disks share one processor";
  }
  return item;
}

HostItem check_memory() {
  constexpr uint64_t kGuest = 256 * 1024;  // kB; the default of --memory
  const uint64_t total = number_after("/proc/meminfo", "MemTotal").value_or(0);
  const uint64_t available = number_after("/proc/meminfo", "MemAvailable").value_or(0);
  HostItem item{.name = "memory",
                .text = fmt::format("{} MiB available of {} MiB", available / 1024, total / 1024),
                .advice = {}};
  if (available < kGuest) {
    item.state = HostState::kLimited;
    item.advice = "less than a guest's default 256M: give `boot` a smaller --memory";
  }
  return item;
}

HostItem check_kvm() {
  const vmm::HostProbe probe = vmm::probe_host();
  HostItem item{.name = "kvm", .needed = true, .text = {}, .advice = probe.advice};
  if (probe.kind == vmm::KvmKind::kNone) {
    item.state = HostState::kMissing;
    item.text = probe.problem;
    return item;
  }
  if (probe.kind != vmm::KvmKind::kHardware) item.state = HostState::kLimited;
  item.text =
      fmt::format("{}{}, up to {} virtual processors", vmm::to_string(probe.kind),
                  probe.cpu_flag.empty() ? "" : " (" + probe.cpu_flag + ")", probe.max_vcpus);
  return item;
}

HostItem check_io_uring() {
  HostItem item{.name = "io_uring", .text = "a ring can be set up", .advice = {}};
  try {
    const base::LoopGroup loops(1, base::BackendChoice::kUring);
    return item;
  } catch (const base::Error& e) {
    item.text = e.what();
  }
  item.state = HostState::kLimited;
  const std::string setting = first_line("/proc/sys/kernel/io_uring_disabled").value_or("0");
  item.advice = setting == "0"
                    ? "a container's seccomp profile may refuse it; "
                    : fmt::format("sysctl kernel.io_uring_disabled is {}: set it to 0; ", setting);
  item.advice += "without it epoll and threads do the same work, more slowly";
  return item;
}

HostItem check_fuse() {
  HostItem item{.name = "fuse", .needed = true, .text = {}, .advice = {}};
  const base::UniqueFd device(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
  const int err = errno;
  const std::string helper = find_program("fusermount3");
  if (device && (may_mount() || !helper.empty())) {
    item.text = may_mount() ? "/dev/fuse opens, mounts need no helper"
                            : "/dev/fuse opens, mounts are made by " + helper;
    return item;
  }
  item.state = HostState::kMissing;
  if (device) {
    item.text = "/dev/fuse opens, but fusermount3 is not installed";
    item.advice = "install it (Debian: apt-get install fuse3), or run as root";
    return item;
  }
  item.text = "/dev/fuse: " + base::errno_text(err);
  item.advice = err == ENOENT ? "load the module (modprobe fuse); for a container add the device "
                                "(--device /dev/fuse --cap-add SYS_ADMIN)"
                              : "this user needs permission to open it; containers need --device "
                                "/dev/fuse";
  return item;
}

HostItem check_allow_other() {
  HostItem item{.name = "fuse allow_other", .text = {}, .advice = {}};
  if (may_mount()) {
    item.text = "allowed to this user";
  } else if (has_line("/etc/fuse.conf", "user_allow_other")) {
    item.text = "allowed by /etc/fuse.conf";
  } else {
    item.state = HostState::kLimited;
    item.text = "only this user can see the files of --fuse";
    item.advice = "for --fuse DIR,allow_other put user_allow_other into /etc/fuse.conf";
  }
  return item;
}

HostItem check_huge_pages() {
  HostItem item{.name = "huge pages", .text = {}, .advice = {}};
  const std::string modes =
      first_line("/sys/kernel/mm/transparent_hugepage/enabled").value_or("not there");
  const uint64_t reserved = number_after("/proc/meminfo", "HugePages_Total").value_or(0);
  item.text = fmt::format("transparent: {}; reserved (hugetlb): {}", modes, reserved);
  if (modes.find("[always]") == std::string::npos && modes.find("[madvise]") == std::string::npos) {
    item.state = HostState::kLimited;
    item.advice =
        "guest memory gets small pages: echo madvise > "
        "/sys/kernel/mm/transparent_hugepage/enabled";
  }
  return item;
}

HostItem check_nbd_module() {
  HostItem item{.name = "nbd module", .text = {}, .advice = {}};
  const std::string modules = "/lib/modules/" + kernel_release();
  const auto lists_it = [&](const char* list) {
    std::ifstream file(modules + list);
    for (std::string line; std::getline(file, line);) {
      if (line.find("/nbd.ko") != std::string::npos) return true;
    }
    return false;
  };
  if (::access("/sys/module/nbd", F_OK) == 0) {
    item.text = "loaded";
  } else if (lists_it("/modules.builtin")) {
    item.text = "built into the kernel";
  } else if (lists_it("/modules.dep")) {
    item.state = HostState::kLimited;
    item.text = "installed, not loaded";
    item.advice = "modprobe nbd, to use nbd-client with our exports on this machine";
  } else {
    item.state = HostState::kMissing;
    item.text = "not there";
    item.advice =
        "only nbd-client on this machine needs it; our server, qemu-img and nbdcopy do not";
  }
  return item;
}

std::vector<HostItem> check_host() {
  return {check_kernel(),      check_processors(), check_memory(),
          check_kvm(),         check_io_uring(),   check_fuse(),
          check_allow_other(), check_huge_pages(), check_nbd_module()};
}

}  // namespace minivmm::cli
