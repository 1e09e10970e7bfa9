// SPDX-License-Identifier: Apache-2.0
#include "cli/image_lock_holders.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>

#include <dirent.h>
#include <fmt/core.h>

#include "base/unique_fd.h"
#include "cli/image_arguments.h"

namespace minivmm::cli {

namespace {

using Directory = std::unique_ptr<DIR, int (*)(DIR*)>;

Directory open_directory(const std::string& path) { return {::opendir(path.c_str()), &::closedir}; }

// "lock:\t1: OFDLCK ADVISORY READ -1 fd:00:1234 100 100": a lock on this very file?
bool names_file(const std::string& line, const std::string& id) {
  return line.starts_with("lock:") && line.find("OFDLCK") != std::string::npos &&
         line.find(" " + id + " ") != std::string::npos;
}

bool holds_lock(const std::string& process, const std::string& id, bool& hidden) {
  const Directory descriptors = open_directory(process + "/fdinfo");
  if (!descriptors) {
    hidden = true;
    return false;
  }
  while (const dirent* entry = ::readdir(descriptors.get())) {
    if (entry->d_name[0] == '.') continue;
    std::ifstream info(process + "/fdinfo/" + entry->d_name);
    for (std::string line; std::getline(info, line);) {
      if (names_file(line, id)) return true;
    }
  }
  return false;
}

}  // namespace

LockHolders find_lock_holders(const std::string& path) {
  LockHolders out;
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return out;
  const std::string id =
      fmt::format("{:02x}:{:02x}:{}", ::major(info.st_dev), ::minor(info.st_dev), info.st_ino);
  const Directory processes = open_directory("/proc");
  if (!processes) {
    out.hidden = true;
    return out;
  }
  while (const dirent* entry = ::readdir(processes.get())) {
    const int pid = std::atoi(entry->d_name);
    if (pid <= 0 || pid == ::getpid()) continue;
    const std::string process = fmt::format("/proc/{}", pid);
    if (!holds_lock(process, id, out.hidden)) continue;
    LockHolder holder{pid, {}};
    std::ifstream name(process + "/comm");
    std::getline(name, holder.command);
    out.found.push_back(std::move(holder));
  }
  return out;
}

namespace {

// By path; those that were there when a sandbox was entered.
std::map<std::string, LockHolders>& remembered() {
  static std::map<std::string, LockHolders> instance;
  return instance;
}

bool is_locked(const std::string& path) {
  const base::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  struct flock range {};
  range.l_type = F_WRLCK;  // conflicts with every other
  range.l_whence = SEEK_SET;
  return fd && ::fcntl(fd.get(), F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

}  // namespace

void remember_lock_holders(const std::string& path) {
  if (is_locked(path)) remembered()[path] = find_lock_holders(path);
}

std::string lock_holders_text(const std::string& path) {
  const auto known = remembered().find(path);
  const LockHolders holders = known != remembered().end() ? known->second : find_lock_holders(path);
  if (holders.found.empty()) {
    return holders.hidden ? "who has it cannot be seen from here"
                          : "who had it has let go of it meanwhile, or is on another host";
  }
  std::string out = "it is locked by ";
  for (size_t i = 0; i < holders.found.size(); ++i) {
    out += fmt::format("{}process {} ({})", i == 0 ? "" : ", ", holders.found[i].pid,
                       printable(holders.found[i].command));
  }
  return out;
}

}  // namespace minivmm::cli
