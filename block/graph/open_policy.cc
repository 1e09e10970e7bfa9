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

// A file that an image refers to, and how messages speak of it.
struct Reference {
  const std::string& image;  // its path
  const std::string& name;   // as recorded
  const char* what;
  const char* remedy;  // how the user's own word is given
};

Error refusal(const Reference& r, int err, const std::string& why) {
  return Error(err, fmt::format("{}: {} '{}' {}", r.image, r.what, r.name, why));
}

void require_file_name(const OpenPolicy& policy, const Reference& r) {
  if (!policy.follow_references) {
    throw refusal(r, EACCES, "is not opened: references inside images are not followed here");
  }
  if (names_a_protocol(r.name)) {
    throw refusal(
        r, EACCES,
        fmt::format("is not a plain file name, and an image is not trusted to choose more "
                    "than that; {}",
                    r.remedy));
  }
}

// Sets the options under `prefix` that open it, once it is known to be a regular file in the
// image's directory or in one of `roots`. What is opened must be the very file that was looked at:
// the name may lead elsewhere a moment later.
void set_allowed_file(Options& options, const std::string& prefix, const Reference& r,
                      const std::vector<std::string>& roots, const char* root_option) {
  const std::string own_directory = directory_of(r.image);
  const std::string path = r.name.starts_with('/') ? r.name : own_directory + "/" + r.name;
  const std::string target = real_path(path);
  if (target.empty()) {
    throw refusal(r, ENOENT, fmt::format("not found (looked for {}); {}", path, r.remedy));
  }
  struct stat info {};
  if (::stat(target.c_str(), &info) != 0 || !S_ISREG(info.st_mode)) {
    throw refusal(r, EACCES, fmt::format("is not a regular file; {}", r.remedy));
  }
  bool allowed = is_below(target, real_path(own_directory));
  for (const std::string& root : roots) allowed = allowed || is_below(target, real_path(root));
  if (!allowed) {
    const std::string option =
        root_option == nullptr
            ? std::string()
            : fmt::format("allow it with {} {} or ", root_option, directory_of(target));
    throw refusal(r, EACCES,
                  fmt::format("lies outside the image's own directory; {}{}", option, r.remedy));
  }
  options.set(prefix + "filename", path);
  options.set(prefix + "inode", fmt::format("{}:{}", info.st_dev, info.st_ino));
}

}  // namespace

Options backing_options(const OpenPolicy& policy, const std::string& image,
                        const std::string& reference, const std::string& format) {
  const Reference r{image, reference, "backing file",
                    "name it yourself (backing=FILE,backing_fmt=FORMAT)"};
  require_file_name(policy, r);
  if (format.empty()) {
    throw refusal(r, EACCES,
                  fmt::format("is recorded without a format, and guessing one is unsafe; record it "
                              "(qemu-img rebase -u -F FORMAT) or {}",
                              r.remedy));
  }
  if (!is_format(format)) {
    throw refusal(r, EINVAL,
                  fmt::format("is recorded with the format '{}', which is not an image format that "
                              "can be opened here",
                              format));
  }
  Options options;
  options.set("driver", format);
  options.set("read-only", "on");
  options.set("file.driver", "file");
  set_allowed_file(options, "file.", r, policy.backing_roots, "--backing-root");
  return options;
}

Options data_file_options(const OpenPolicy& policy, const std::string& image,
                          const std::string& reference, bool writable) {
  const Reference r{image, reference, "data file",
                    "name it yourself (data-file.driver=file,data-file.filename=FILE)"};
  require_file_name(policy, r);
  // What may be read for a backing file is not thereby free to be written.
  const std::vector<std::string> none;
  Options options;
  options.set("driver", "file");
  options.set("read-only", writable ? "off" : "on");
  set_allowed_file(options, "", r, writable ? none : policy.backing_roots,
                   writable ? nullptr : "--backing-root");
  return options;
}

}  // namespace minivmm::block
