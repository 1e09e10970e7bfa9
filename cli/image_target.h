// SPDX-License-Identifier: Apache-2.0
// The image that a command writes from its beginning to its end: made, or one that is there;
// opened; and, unless it was finished, removed or named as incomplete.
//
// Fiber of the graph's first loop.
#pragma once

#include <string>

#include <memory>

#include "cli/image_create_file.h"
#include "cli/image_open.h"

namespace minivmm::cli {

class TargetImage {
 public:
  // Makes `image` (see complete_image) and opens it. Its backing file is the user's word.
  TargetImage(ImageGraph& graph, NewImage& image, CacheMode cache);
  // Opens one that is there. It is as it was until begin().
  TargetImage(ImageGraph& graph, const ImageName& name, CacheMode cache);
  // Without finish(): the file is removed if it was made here, otherwise a line on standard error
  // says that it is incomplete.
  ~TargetImage();
  TargetImage(const TargetImage&) = delete;
  TargetImage& operator=(const TargetImage&) = delete;

  OpenImage& image() noexcept { return *image_; }
  block::Edge& edge() noexcept { return image_->edge(); }
  // From here on it is being overwritten.
  void begin() noexcept { touched_ = true; }
  // Everything reads as zeroes.
  bool is_zero() const noexcept { return is_zero_; }
  // Flushes and closes it. Throws what that finds; it is incomplete then.
  void finish();

 private:
  void give_up() noexcept;

  std::string path_;
  bool made_ = false;
  bool touched_ = false;  // what was there is lost, or being overwritten
  bool is_zero_ = false;
  std::unique_ptr<OpenImage> image_;
};

}  // namespace minivmm::cli
