// SPDX-License-Identifier: Apache-2.0
// The directory that is mounted on: made ready before, put back after. The calls block (they belong
// in the pool), on a file system that hangs for as long as it hangs.
#pragma once

#include <string>
#include <string_view>

#include <optional>
#include <vector>

namespace minivmm::fuse {

// The type under which /proc/self/mountinfo knows our mounts.
inline constexpr std::string_view kMountType = "fuse.minivmm";

struct MountEntry {
  std::string point;
  std::string type;
  std::string source;
};

// The text of /proc/self/mountinfo: the mounts at exactly `point`, the lowest first. Lines that
// are not understood are skipped.
std::vector<MountEntry> mounts_at(std::string_view mountinfo, std::string_view point);

// What our mounts are named by: "minivmm:1234", with the process's number.
std::string mount_source();
// Whether the topmost mount at `path` is one that this process made.
bool is_mount_of_this_process(const std::string& path);

struct Mountpoint {
  std::string path;      // absolute, without symbolic links
  bool created = false;  // by us, to be removed at the end
};

// `path` absolute and without symbolic links; what lies there is not looked at. Throws base::Error
// where its parent directory is not there.
std::string resolve_mountpoint(const std::string& path);

// Resolves `path`, detaches dead mounts of ours, and makes sure that an empty directory is there,
// making it if need be. Waits up to some seconds for a mount that does not answer. Throws
// base::Error: EBUSY for a mount that is alive or not ours, ENOTDIR, ENOTEMPTY, what the system
// says.
Mountpoint prepare_mountpoint(const std::string& path);

// Unmounts what is mounted at `path`; false if it is in use. Throws base::Error.
bool unmount(const std::string& path);
// Detaches it also while it is in use; `abort`: and fails whatever waits for an answer from it
// (root only). Throws base::Error.
void detach(const std::string& path, bool abort = false);
// Writes back what processes that mapped files have changed, through the mount. Errors are
// ignored: there is nobody to tell.
void sync_mount(const std::string& path) noexcept;

// Removes the directory if we made it.
void restore_mountpoint(const Mountpoint& mountpoint) noexcept;

}  // namespace minivmm::fuse
