// SPDX-License-Identifier: Apache-2.0
// Keeps a command that reads images from doing anything else. Before the first byte of an image is
// looked at the process gives up, for good:
//  - files: Landlock leaves the named images (read-only) and nothing more;
//  - system calls: seccomp leaves what reading files on event loops needs. No io_uring, which would
//    pass by seccomp, no sockets, no programs, nothing that writes to a file but those that were
//    open before (standard output);
//  - memory and CPU time: stated limits.
// What the kernel lacks is named once, as a warning; with --untrusted it is an error.
//
// An image that is not trusted is opened alone: no file that it names. Called as qemu-img the files
// of its chain are looked for first, by a child whose memory and CPU time are limited, and are then
// the named ones.
#pragma once

#include <string>

#include <cstdint>
#include <functional>
#include <vector>

#include <boost/program_options.hpp>

#include "cli/image_named_file.h"

namespace minivmm::cli {

// 0: no limit. Called as qemu-img there are none unless they are given.
struct SandboxLimits {
  uint64_t memory = 0;  // bytes of data (RLIMIT_DATA)
  uint64_t cpu_seconds = 0;
};

// --untrusted, --trusted, --backing-root, --limit-memory, --limit-cpu.
void add_sandbox_options(boost::program_options::options_description& options);

class Sandbox {
 public:
  enum class Backing {
    kNotNeeded,  // the command looks at the images themselves alone
    kAsked,      // at what they name as well: the user asked for that
    kIfTrusted,  // at what they name as well, where that is trusted
  };
  // Throws EINVAL for options that do not go together.
  Sandbox(const boost::program_options::variables_map& values, std::vector<ImageName> images,
          Backing backing);

  // What images record is followed: where it is needed, with --trusted, and called as qemu-img
  // without --untrusted.
  bool follows_references() const noexcept { return follow_; }
  // `mode` with what may be followed filled in.
  OpenMode open_mode(OpenMode mode) const noexcept;

  // Goes into the sandbox and calls `body` on a fiber of a graph in it. Main thread, before any
  // other thread was made; once. There is no way back.
  void run(const std::function<void(ImageGraph& graph)>& body);

 private:
  std::vector<std::string> files_of_chain(const NamedFile& image) const;
  std::vector<std::string> files_to_allow() const;

  const std::vector<ImageName> images_;
  bool asked_ = false;
  bool follow_ = false;
  bool must_hold_ = false;  // --untrusted: what the kernel lacks is an error
  block::OpenPolicy policy_;
  SandboxLimits limits_;
};

// The parts, for Sandbox and its tests. Main thread. Each throws base::Error with ENOSYS or
// EOPNOTSUPP where the kernel lacks it.
void limit_resources(const SandboxLimits& limits);
void limit_files(const std::vector<std::string>& readable);
void limit_system_calls();

}  // namespace minivmm::cli
