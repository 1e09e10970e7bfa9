// SPDX-License-Identifier: Apache-2.0
#include "cli/image_create_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/pool.h"
#include "base/unique_fd.h"
#include "block/formats/luks/luks_node.h"
#include "block/formats/qcow2/create.h"
#include "cli/image_arguments.h"
#include "cli/image_facts.h"
#include "cli/image_open.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace qcow2 = block::qcow2;
using base::Error;

bool print_create_options(const boost::program_options::variables_map& values,
                          std::string_view format, bool target_is_last) {
  for (const std::string& text : text_values(values, "options")) {
    if (!CreateOptionList::asks_for_help(text)) continue;
    const size_t names = given_names(values).size();
    fmt::print("{}", CreateOptionList(format).help(names > (target_is_last ? 1 : 0)));
    return true;
  }
  return false;
}

NodeOptions NewImage::open_options() const {
  NodeOptions out;
  for (const char* name : {"key-secret", "encrypt.key-secret"}) {
    if (options.has(name)) out.emplace_back(name, options.get(name));
  }
  return out;
}

void set_backing(NewImage& image, const std::optional<std::string>& backing,
                 const std::optional<std::string>& format) {
  const bool none = image.format != "qcow2";
  if (backing) {
    if (none) {
      throw Error(EINVAL,
                  fmt::format("Backing file not supported for file format '{}'", image.format));
    }
    image.options.set("backing_file", *backing);
  }
  if (format) {
    if (none) {
      throw Error(EINVAL, fmt::format("Backing file format not supported for file format '{}'",
                                      image.format));
    }
    image.options.set("backing_fmt", *format);
  }
}

namespace {

ImageFacts look_at_backing(ImageGraph& graph, const std::string& path, const std::string& format) {
  try {
    return inspect_image(graph, path, format, {.locked = false});
  } catch (const Error& e) {
    if (!personality().drop_in || e.err() != ENOENT) throw;
    throw Error(ENOENT, fmt::format("Could not open '{}': {}\nCould not open backing image.", path,
                                    base::errno_text(ENOENT)));
  }
}

// The backing file must be there, and of the format that is recorded for it; it gives the size
// where none was asked for. It is the user's word, so it may lie anywhere.
void check_backing(ImageGraph& graph, NewImage& request) {
  if (request.format != "qcow2") return;
  const std::string recorded = request.options.get("backing_file");
  const std::string format = request.options.get("backing_fmt");
  if (!request.options.has("backing_file")) {
    return;  // check_image() says whether that is right
  }
  if (recorded.empty()) throw Error(EINVAL, "Expected backing file name, got empty string");
  if (!format.empty() && !is_format(format)) {
    if (personality().drop_in) {
      throw Error(EINVAL,
                  fmt::format("Unknown driver '{}'\nCould not open backing image.", format));
    }
    throw Error(EINVAL, fmt::format("Unknown backing file format '{}' (qcow2, raw and luks are "
                                    "supported)",
                                    format));
  }
  const std::string path = path_from_image(request.path, recorded);
  if (same_file(path, request.path)) {
    throw Error(EINVAL,
                "Error: Trying to create an image with the same filename as the backing file");
  }
  constexpr const char* kNoFormat = "Backing file specified without backing format";
  if (!request.look_at_backing) {
    if (format.empty()) throw Error(EINVAL, kNoFormat);
    return;
  }
  const ImageFacts backing = look_at_backing(graph, host_path(path), format);
  if (format.empty()) {
    throw Error(EINVAL,
                fmt::format("{}\nDetected format of {}{}.", kNoFormat, backing.format,
                            hint(fmt::format(": add -F {} if that is right", backing.format))));
  }
  if (!request.options.has("size")) {
    request.options.set("size", fmt::format("{}", backing.virtual_size));
  }
}

// How the file system is to treat the file, while it is still empty. Not every one knows this, and
// nothing of what is stored depends on it.
void set_attributes(int fd, const CreateOptionList& options) {
  int flags = 0;
  if (options.is_on("nocow") && ::ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
    flags |= FS_NOCOW_FL;
    (void)::ioctl(fd, FS_IOC_SETFLAGS, &flags);
  }
  const uint64_t hint = options.bytes("extent_size_hint").value_or(0);
  struct fsxattr more {};
  if (hint == 0 || ::ioctl(fd, FS_IOC_FSGETXATTR, &more) != 0) return;
  more.fsx_xflags |= FS_XFLAG_EXTSIZE;
  more.fsx_extsize = static_cast<uint32_t>(std::min<uint64_t>(hint, UINT32_MAX));
  if (::ioctl(fd, FS_IOC_FSSETXATTR, &more) != 0 && errno != EOPNOTSUPP && errno != ENOTTY) {
    throw base::errno_error(errno, "Failed to set extent size hint");
  }
}

// Makes the file if it is not there; true if it was not.
bool make_file(const std::string& path, const CreateOptionList& options) {
  base::UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (fd) {
    try {
      set_attributes(fd.get(), options);
    } catch (...) {
      ::unlink(path.c_str());
      throw;
    }
    return true;
  }
  // Not exclusively: a symbolic link may lead to a file that is yet to be made.
  if (errno == EEXIST) {
    fd.reset(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0644));
  }
  if (!fd) throw base::errno_error(errno, fmt::format("Could not create '{}'", path));
  return false;
}

void allocate(const std::string& path, uint64_t size) {
  // Allocation is the file system's; it needs a descriptor of its own, whose end does not touch
  // the node's locks.
  const base::UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) throw base::errno_error(errno, path);
  const int err = base::Pool::syscalls().run(
      [&] { return ::posix_fallocate(fd.get(), 0, static_cast<off_t>(size)); });
  if (err != 0) throw base::errno_error(err, "Could not preallocate data for the new file");
}

void write_out_zeroes(block::Edge& file, uint64_t begin, uint64_t end) {
  constexpr uint64_t kPiece = 1 << 20;
  base::Buffer zeroes = base::Buffer::zeroed(kPiece);
  for (uint64_t at = begin; at < end; at += kPiece) {
    const base::SingleBuffer piece(zeroes.data(), std::min(kPiece, end - at));
    file.write(at, piece);
  }
  file.flush();
}

// A device keeps its size and content; it only has to be large enough.
void require_device_size(block::Edge& device, uint64_t size) {
  if (device.size() >= size) return;
  throw Error(ENOSPC, fmt::format("The device has {} bytes, fewer than the {} asked for",
                                  device.size(), size));
}

enum class Preallocation { kOff, kFalloc, kFull };

Preallocation raw_preallocation(const CreateOptionList& options) {
  if (options.get("preallocation") == "metadata") {
    throw Error(ENOTSUP, "Unsupported preallocation mode: metadata");
  }
  block::Options given = options.for_driver();
  return static_cast<Preallocation>(
      given.take_choice("preallocation", {"off", "falloc", "full"}, 0));
}

// Fiber.
void write_raw(block::Edge& file, const NewImage& request) {
  const std::string& path = request.path;
  // Whole sectors, as qemu-img makes them.
  const uint64_t size = base::align_up<uint64_t>(*request.options.size(), 512);
  struct stat info {};
  if (::stat(path.c_str(), &info) == 0 && S_ISBLK(info.st_mode)) {
    return require_device_size(file, size);
  }
  file.truncate(0);
  try {
    file.truncate(size);
  } catch (const Error& e) {
    if (e.err() != EFBIG) throw;
    throw Error(EFBIG, "The image size is too large for file format 'raw'");
  }
  const Preallocation wanted = raw_preallocation(request.options);
  if (wanted == Preallocation::kFalloc && size > 0) allocate(path, size);
  if (wanted == Preallocation::kFull) write_out_zeroes(file, 0, size);
}

// Fiber.
void write_luks(block::Edge& file, const NewImage& request) {
  block::luks::create_image(file, luks_options(request.options));
  const Preallocation wanted = raw_preallocation(request.options);
  if (wanted == Preallocation::kFalloc) allocate(request.path, file.size());
  if (wanted == Preallocation::kFull) {
    // What the disk reads as is undefined anyway: noise.
    const uint64_t payload = block::read_luks_header(file).payload_offset();
    write_out_zeroes(file, payload, file.size());
  }
}

qcow2::CreateOptions qcow2_options(const CreateOptionList& options) {
  block::Options given = options.for_driver();
  const qcow2::CreateOptions out = qcow2::take_create_options(given);
  given.finish("-o");
  return out;
}

// Fiber.
void write_qcow2(ImageGraph& graph, block::Edge& file, const NewImage& image) {
  const qcow2::CreateOptions options = qcow2_options(image.options);
  if (options.data_file.empty()) {
    qcow2::create_image(file, options);
    return;
  }
  const std::string path = host_path(path_from_image(image.path, options.data_file));
  if (same_file(path, image.path)) {
    throw Error(EINVAL, "The external data file cannot be the image itself");
  }
  make_file(path, image.options);
  graph.use_file(path, {.writable = true, .no_flush = image.no_flush},
                 [&](block::Edge& data) { qcow2::create_image(file, options, &data); });
}

}  // namespace

block::luks::CreateOptions luks_options(const CreateOptionList& options) {
  block::Options given = options.for_driver();
  (void)given.take_string("preallocation");
  const block::luks::CreateOptions out = block::luks::take_create_options(given);
  given.finish("-o");
  return out;
}

void complete_image(ImageGraph& graph, NewImage& image) {
  check_backing(graph, image);
  if (!image.options.has("size")) throw Error(EINVAL, "Image creation needs a size parameter");
}

namespace {

// What can be found out before anything is made.
void check_image(const NewImage& image) {
  if (image.options.has("backing_fmt") && !image.options.has("backing_file")) {
    throw Error(EINVAL, "Backing format cannot be used without backing file");
  }
  if (image.format == "qcow2") {
    qcow2::check_create_options(qcow2_options(image.options));
  } else {
    if (image.format == "luks") (void)luks_options(image.options);
    (void)raw_preallocation(image.options);
  }
}

}  // namespace

bool make_image(ImageGraph& graph, const NewImage& image) {
  check_image(image);
  const bool made = make_file(image.path, image.options);
  try {
    const FileAccess access{.writable = true, .no_flush = image.no_flush};
    graph.use_file(image.path, access, [&](block::Edge& file) {
      if (image.format == "qcow2") {
        write_qcow2(graph, file, image);
      } else if (image.format == "luks") {
        write_luks(file, image);
      } else {
        write_raw(file, image);
      }
    });
  } catch (...) {
    if (made) ::unlink(image.path.c_str());
    throw;
  }
  return made;
}

}  // namespace minivmm::cli
