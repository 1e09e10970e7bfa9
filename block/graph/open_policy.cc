// SPDX-License-Identifier: Apache-2.0
#include "block/graph/open_policy.h"

#include <stdlib.h>
#include <sys/stat.h>

#include <cerrno>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/driver.h"

namespace minivmm::block {

using base::Error;

namespace {

std::string directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Symbolic links resolved; empty if it does not exist.
std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&::free)> resolved(::realpath(path.c_str(), nullptr),
                                                          &::free);
  return resolved ? std::string(resolved.get()) : std::string();
}

bool is_below(const std::string& path, const std::string& directory) {
  if (directory.empty()) return false;
  if (directory == "/") return true;
  return path.size() > directory.size() && path.starts_with(directory) &&
         path[directory.size()] == '/';
}

// "nbd://...", "json:{...}", "fat:dir": anything but a file name. QEMU's rule: a colon before
// any slash.
bool names_a_protocol(const std::string& reference) {
  const size_t colon = reference.find(':');
  return colon != std::string::npos && colon < reference.find('/');
}

// Other drivers are not an image's to choose.
bool is_format(const std::string& name) {
  for (const Driver& driver : drivers()) {
    if (driver.name == name) return driver.kind == DriverKind::kFormat;
  }
  return false;
}

}  // namespace

Options backing_options(const OpenPolicy& policy, const std::string& image,
                        const std::string& reference, const std::string& format) {
  const auto refuse = [&](int err, const std::string& why) {
    return Error(err, fmt::format("{}: backing file '{}' {}", image, reference, why));
  };
  constexpr const char* kNameIt = "name it yourself (backing=FILE,backing_fmt=FORMAT)";
  if (!policy.follow_references) {
    throw refuse(EACCES, "is not opened: references inside images are not followed here");
  }
  if (names_a_protocol(reference)) {
    throw refuse(EACCES, fmt::format("is not a plain file name, and an image is not trusted to "
                                     "choose more than that; {}",
                                     kNameIt));
  }
  if (format.empty()) {
    throw refuse(EACCES, fmt::format("is recorded without a format, and guessing one is unsafe; "
                                     "record it (qemu-img rebase -u -F FORMAT) or {}",
                                     kNameIt));
  }
  if (!is_format(format)) {
    throw refuse(EINVAL, fmt::format("is recorded with the format '{}', which is not an image "
                                     "format that can be opened here",
                                     format));
  }
  const std::string own_directory = directory_of(image);
  const std::string path = reference.starts_with('/') ? reference : own_directory + "/" + reference;
  const std::string target = real_path(path);
  if (target.empty()) {
    throw refuse(ENOENT, fmt::format("not found (looked for {}); {}", path, kNameIt));
  }
  struct stat info {};
  if (::stat(target.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) {
    throw refuse(EACCES, fmt::format("is not a regular file; {}", kNameIt));
  }
  bool allowed = is_below(target, real_path(own_directory));
  for (const std::string& root : policy.backing_roots) {
    allowed = allowed || is_below(target, real_path(root));
  }
  if (!allowed) {
    throw refuse(EACCES, fmt::format("lies outside the image's own directory; allow it with "
                                     "--backing-root {} or {}",
                                     directory_of(target), kNameIt));
  }
  Options options;
  options.set("driver", format);
  options.set("read-only", "on");
  options.set("file.driver", "file");
  options.set("file.filename", path);
  return options;
}

}  // namespace minivmm::block
