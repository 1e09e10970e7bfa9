// SPDX-License-Identifier: Apache-2.0
#include "cli/image_target.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "cli/image_arguments.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

using base::Error;

namespace {

bool is_device(const std::string& path) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 && S_ISBLK(info.st_mode);
}

// A file that is in use, as qemu-img says it.
[[noreturn]] void refuse_used(const std::string& path, const Error& error) {
  if (!personality().drop_in) throw Error(EBUSY, error.what());
  throw Error(EBUSY, fmt::format("Failed to get \"write\" lock\nIs another process using the image "
                                 "[{}]?",
                                 path));
}

}  // namespace

TargetImage::TargetImage(ImageGraph& graph, NewImage& image, CacheMode cache) : path_(image.path) {
  // What flushes nothing when it is complete has no use for the flushes of an empty image.
  image.no_flush = cache.no_flush;
  try {
    complete_image(graph, image);
    try {
      made_ = make_image(graph, image);
    } catch (const Error& e) {
      if (e.err() == EBUSY) refuse_used(image.path, e);
      throw;
    }
  } catch (Error& e) {
    e.prepend(fmt::format("{}: error while {}", image.file_name,
                          image.purpose.empty() ? "converting " + image.format : image.purpose));
    throw;
  }
  touched_ = true;
  // What is preallocated in an encrypted image reads as noise.
  const bool noise = image.options.encrypted() && image.options.has("preallocation");
  is_zero_ = image.format == "qcow2" ? !image.options.has("backing_file") && !noise
                                     : image.format == "raw" && !is_device(path_);
  try {
    image_ = std::make_unique<OpenImage>(
        graph, ImageName{image.file_name, image.format},
        OpenMode{
            .writable = true, .trusted = true, .cache = cache, .options = image.open_options()});
  } catch (...) {
    give_up();
    throw;
  }
}

TargetImage::TargetImage(ImageGraph& graph, const ImageName& name, CacheMode cache)
    : path_(name.text),
      image_(std::make_unique<OpenImage>(
          graph, name, OpenMode{.writable = true, .trusted = true, .cache = cache})) {}

TargetImage::~TargetImage() { give_up(); }

void TargetImage::finish() {
  image_->close();
  touched_ = false;
}

void TargetImage::give_up() noexcept {
  if (!touched_) return;
  touched_ = false;
  try {
    // First: what it has in memory goes to the file.
    image_.reset();
    if (made_ && ::unlink(path_.c_str()) == 0) {
      print_error(fmt::format("{}: was not completed, and has been removed", printable(path_)));
    } else {
      print_error(
          fmt::format("{}: is incomplete: what it holds now is of no use", printable(path_)));
    }
  } catch (const std::exception& e) {
    base::log_error("{}", e.what());
  }
}

}  // namespace minivmm::cli
