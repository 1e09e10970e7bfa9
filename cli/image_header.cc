// SPDX-License-Identifier: Apache-2.0
#include "cli/image_header.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <memory>
#include <optional>

#include <fmt/core.h>

#include "base/error.h"
#include "base/iovec.h"
#include "base/unique_fd.h"
#include "block/formats/qcow2/create.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/image_file.h"

namespace minivmm::cli {

namespace qcow2 = block::qcow2;
using base::Error;

void change_backing_name(ImageGraph& graph, const std::string& path, const std::string& backing,
                         const std::string& backing_format) {
  graph.use_file(path, {.writable = true}, [&](block::Edge& file) {
    try {
      qcow2::Header header = qcow2::read_header(file);
      header.has_backing = !backing.empty();
      header.backing_file = backing;
      header.backing_format = backing.empty() ? std::string() : backing_format;
      const std::vector<std::byte> bytes = qcow2::serialise_header(header);
      file.write(0, base::SingleBuffer(std::span<const std::byte>(bytes)));
      file.flush();
    } catch (Error& e) {
      e.prepend(fmt::format("Could not change the backing file to '{}'", backing));
      throw;
    }
  });
}

namespace {

// The options with which an empty image of the same kind is made; nothing where that would lose
// something.
std::optional<qcow2::CreateOptions> same_kind(const qcow2::Header& h) {
  const bool more =
      h.snapshots != 0 || h.bitmaps || !h.unknown_extensions.empty() || h.crypt_method != 0 ||
      h.autoclear != 0 ||
      (h.incompatible & ~(qcow2::kIncompatCompression | qcow2::kIncompatExtendedL2)) != 0;
  if (more) return std::nullopt;
  qcow2::CreateOptions out;
  out.size = h.size;
  out.version = h.version;
  out.cluster_bits = h.cluster_bits;
  out.refcount_order = h.refcount_order;
  out.compression = h.compression;
  out.extended_l2 = (h.incompatible & qcow2::kIncompatExtendedL2) != 0;
  out.lazy_refcounts = (h.compatible & qcow2::kCompatLazyRefcounts) != 0;
  out.backing_file = h.backing_file;
  out.backing_format = h.backing_format;
  return out;
}

std::string real_path(const std::string& path) {
  const std::unique_ptr<char, decltype(&::free)> resolved(::realpath(path.c_str(), nullptr),
                                                          &::free);
  return resolved ? std::string(resolved.get()) : path;
}

// A file beside `path` with its owner and permissions; empty if there can be none.
std::string make_beside(const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0 || !S_ISREG(info.st_mode) || info.st_nlink != 1) return {};
  std::string name = path + ".emptied-XXXXXX";
  const base::UniqueFd fd(::mkostemp(name.data(), O_CLOEXEC));
  if (!fd) return {};
  if (::fchmod(fd.get(), info.st_mode & 07777) != 0 ||
      ::fchown(fd.get(), info.st_uid, info.st_gid) != 0) {
    ::unlink(name.c_str());
    return {};
  }
  return name;
}

void sync_directory_of(const std::string& path) {
  const std::string directory = path.substr(0, path.rfind('/'));
  const base::UniqueFd fd(
      ::open(directory.empty() ? "/" : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd) (void)::fsync(fd.get());
}

}  // namespace

bool replace_by_empty(ImageGraph& graph, const std::string& path) {
  const std::string real = real_path(path);
  const qcow2::Header header =
      graph.use_file(real, {}, [](block::Edge& file) { return qcow2::read_header(file); });
  const std::optional<qcow2::CreateOptions> options = same_kind(header);
  if (!options) return false;
  const std::string beside = make_beside(real);
  if (beside.empty()) return false;
  try {
    graph.use_file(beside, {.writable = true},
                   [&](block::Edge& file) { qcow2::create_image(file, *options); });
    if (::rename(beside.c_str(), real.c_str()) != 0) throw base::errno_error(errno, real);
  } catch (...) {
    ::unlink(beside.c_str());
    throw;
  }
  sync_directory_of(real);
  return true;
}

}  // namespace minivmm::cli
