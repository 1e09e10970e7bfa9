// SPDX-License-Identifier: Apache-2.0
// minivmm image create
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/pool.h"
#include "base/unique_fd.h"
#include "block/formats/qcow2/create.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_create_options.h"
#include "cli/image_facts.h"
#include "cli/image_graph.h"

namespace minivmm::cli {

namespace po = boost::program_options;
namespace qcow2 = block::qcow2;
using base::Error;
using Strings = std::vector<std::string>;

namespace {

constexpr const char* kUsage =
    "Usage: minivmm image create [-f FORMAT] [-b BACKING -F BACKING_FORMAT] [-o OPTIONS] FILE "
    "[SIZE]\n\n"
    "Makes a disk image. SIZE is in bytes or with a suffix (k, M, G, T, P, E, powers of 1024); an\n"
    "image with a backing file takes that one's size where none is given. What FILE held is lost;\n"
    "a file that is in use is refused.\n\n"
    "Examples:\n"
    "  minivmm image create -f qcow2 disk.qcow2 20G\n"
    "  minivmm image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2\n"
    "  minivmm image create -f qcow2 -o cluster_size=128k,lazy_refcounts=on disk.qcow2 20G\n"
    "  minivmm image create -f raw -o preallocation=falloc disk.img 20G\n"
    "  minivmm image create -f qcow2 -o help          # every option\n\n";

ImageSyntax syntax() {
  ImageSyntax out{kUsage, po::options_description("Options", 100, 60)};
  // clang-format off
  out.options.add_options()
    ("format,f", po::value<std::string>()->default_value("raw")->value_name("FORMAT"),
     "qcow2 or raw")
    ("backing,b", po::value<std::string>()->value_name("FILE"),
     "the backing file, as it is recorded: relative to the new image's directory")
    ("backing-format,F", po::value<std::string>()->value_name("FORMAT"),
     "the backing file's format; -b needs it")
    ("unsafe,u", po::bool_switch(), "record the backing file without looking at it")
    ("options,o", po::value<Strings>()->composing()->value_name("NAME=VALUE,..."),
     "options of the format; `-o help` lists them");
  // clang-format on
  add_common_options(out.options, "q");
  return out;
}

struct Request {
  std::string file_name;  // as given
  std::string path;
  std::string format;
  bool quiet = false;
  bool look_at_backing = true;
  CreateOptionList options{"raw"};
};

uint64_t parse_size_argument(const std::string& text) {
  constexpr uint64_t kMost = INT64_MAX;
  uint64_t size = 0;
  try {
    size = block::parse_size(text, "size");
  } catch (const Error&) {
    throw Error(EINVAL,
                "Invalid image size specified. You may use k, M, G, T, P or E suffixes for\n"
                "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.");
  }
  if (size > kMost) {
    throw Error(EINVAL,
                fmt::format("Invalid image size specified. Must be between 0 and {}.", kMost));
  }
  return size;
}

void set_backing(CreateOptionList& options, const po::variables_map& values,
                 const std::string& format) {
  if (values.count("backing") != 0) {
    if (format == "raw") throw Error(EINVAL, "Backing file not supported for file format 'raw'");
    options.set("backing_file", text_value(values, "backing"));
  }
  if (values.count("backing-format") != 0) {
    if (format == "raw") {
      throw Error(EINVAL, "Backing file format not supported for file format 'raw'");
    }
    options.set("backing_fmt", text_value(values, "backing-format"));
  }
}

Request read_request(const po::variables_map& values, const Strings& names) {
  Request out;
  out.file_name = names[0];
  out.format = text_value(values, "format");
  out.quiet = is_set(values, "quiet");
  out.look_at_backing = !is_set(values, "unsafe");
  // Before anything else, as qemu-img: a wrong size is not blamed on the file.
  const bool sized = names.size() > 1;
  const uint64_t size = sized ? parse_size_argument(names[1]) : 0;
  try {
    out.options = CreateOptionList(out.format);
    if (values.count("options") != 0) {
      for (const std::string& text : values["options"].as<Strings>()) out.options.parse(text);
    }
    if (sized) {
      if (out.options.has("size")) {
        throw Error(EINVAL, "The image size must be specified only once");
      }
      out.options.set("size", fmt::format("{}", size));
    }
    set_backing(out.options, values, out.format);
  } catch (Error& e) {
    e.prepend(out.file_name);
    throw;
  }
  out.path = host_path(out.file_name);
  return out;
}

// By what they are, not by name: overwriting one's own backing file would destroy it.
bool same_file(const std::string& a, const std::string& b) {
  struct stat first {};
  struct stat second {};
  if (a == b) return true;
  return ::stat(a.c_str(), &first) == 0 && ::stat(b.c_str(), &second) == 0 &&
         first.st_dev == second.st_dev && first.st_ino == second.st_ino;
}

// The backing file must be there, and of the format that is recorded for it; it gives the size
// where none was asked for. It is the user's word, so it may lie anywhere.
void check_backing(ImageGraph& graph, Request& request) {
  const std::string recorded = request.options.get("backing_file");
  const std::string format = request.options.get("backing_fmt");
  if (!request.options.has("backing_file")) {
    if (!format.empty()) throw Error(EINVAL, "Backing format cannot be used without backing file");
    return;
  }
  if (recorded.empty()) throw Error(EINVAL, "Expected backing file name, got empty string");
  if (!format.empty() && format != "qcow2" && format != "raw") {
    throw Error(
        EINVAL,
        fmt::format("Unknown backing file format '{}' (qcow2 and raw are supported)", format));
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
  const ImageFacts backing = inspect_image(graph, host_path(path), format, {.locked = false});
  if (format.empty()) {
    throw Error(EINVAL, fmt::format("{}\nDetected format of {}: add -F {} if that is right.",
                                    kNoFormat, backing.format, backing.format));
  }
  if (!request.options.has("size")) {
    request.options.set("size", fmt::format("{}", backing.virtual_size));
  }
}

// Makes the file if it is not there; true if it was not.
bool make_file(const std::string& path) {
  base::UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (fd) return true;
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

void write_out_zeroes(block::Edge& file, uint64_t size) {
  constexpr uint64_t kPiece = 1 << 20;
  base::Buffer zeroes = base::Buffer::zeroed(kPiece);
  for (uint64_t at = 0; at < size; at += kPiece) {
    const base::SingleBuffer piece(zeroes.data(), std::min(kPiece, size - at));
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
  block::Options given = options.for_driver();
  return static_cast<Preallocation>(
      given.take_choice("preallocation", {"off", "falloc", "full"}, 0));
}

// Fiber.
void write_raw(block::Edge& file, const Request& request) {
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
  if (wanted == Preallocation::kFull) write_out_zeroes(file, size);
}

qcow2::CreateOptions qcow2_options(const CreateOptionList& options) {
  const std::string preallocation = options.get("preallocation");
  if (preallocation == "falloc" || preallocation == "full") {
    throw Error(ENOTSUP, fmt::format("option 'preallocation={}' is not supported for qcow2 (off "
                                     "and metadata are)",
                                     preallocation));
  }
  block::Options given = options.for_driver();
  const qcow2::CreateOptions out = qcow2::take_create_options(given);
  given.finish("-o");
  return out;
}

void create(ImageGraph& graph, Request& request) {
  check_backing(graph, request);
  if (!request.options.has("size")) throw Error(EINVAL, "Image creation needs a size parameter");
  // Everything that can be known to be wrong is, before the file is touched.
  qcow2::CreateOptions qcow2;
  if (request.format == "qcow2") {
    qcow2 = qcow2_options(request.options);
  } else {
    (void)raw_preallocation(request.options);
  }
  if (!request.quiet) {
    fmt::print("Formatting '{}', fmt={} {}\n", request.file_name, request.format,
               request.options.formatted());
    std::fflush(stdout);
  }
  const bool made = make_file(request.path);
  try {
    graph.with_file(request.path, {.writable = true}, [&](block::Edge& file) {
      if (request.format == "qcow2") {
        qcow2::create_image(file, qcow2);
      } else {
        write_raw(file, request);
      }
    });
  } catch (...) {
    if (made) ::unlink(request.path.c_str());
    throw;
  }
}

// The answer to `-o help`, which needs no file name.
bool print_option_help(const po::variables_map& values) {
  if (values.count("options") == 0) return false;
  for (const std::string& text : values["options"].as<Strings>()) {
    if (!CreateOptionList::asks_for_help(text)) continue;
    fmt::print("{}", CreateOptionList(text_value(values, "format")).help());
    return true;
  }
  return false;
}

}  // namespace

int run_image_create(const Strings& arguments) {
  po::variables_map values;
  if (!parse_image_arguments(arguments, syntax(), values)) return 0;
  if (print_option_help(values)) return 0;
  const Strings names = given_names(values);
  if (names.empty()) throw UsageError{"Expecting image file name"};
  if (names.size() > 2) throw UsageError{fmt::format("Unexpected argument: {}", names[2])};
  Request request = read_request(values, names);
  ImageGraph graph;
  try {
    create(graph, request);
  } catch (Error& e) {
    e.prepend(request.file_name);
    throw;
  }
  return 0;
}

}  // namespace minivmm::cli
