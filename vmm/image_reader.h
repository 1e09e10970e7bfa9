// SPDX-License-Identifier: Apache-2.0
// Random access to the bytes of a kernel or initrd, so that the parsers are the same for a file, an
// embedded image and a test. Files are read, not mapped: one that shrinks meanwhile is an error
// instead of a SIGBUS.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/unique_fd.h"

namespace minivmm::vmm {

class ImageReader {
 public:
  explicit ImageReader(std::string name) : name_(std::move(name)) {}
  virtual ~ImageReader() = default;
  ImageReader(const ImageReader&) = delete;
  ImageReader& operator=(const ImageReader&) = delete;

  const std::string& name() const noexcept { return name_; }  // for messages
  virtual uint64_t size() const noexcept = 0;
  // Fills `out` from `offset`. Throws base::Error: EINVAL where the image ends before.
  void read(uint64_t offset, std::span<std::byte> out, const char* what) const;

 protected:
  // The range lies inside size().
  virtual void do_read(uint64_t offset, std::span<std::byte> out) const = 0;

 private:
  std::string name_;
};

// Does not own the bytes.
class SpanReader final : public ImageReader {
 public:
  SpanReader(std::string name, std::span<const std::byte> bytes)
      : ImageReader(std::move(name)), bytes_(bytes) {}
  uint64_t size() const noexcept override { return bytes_.size(); }

 protected:
  void do_read(uint64_t offset, std::span<std::byte> out) const override;

 private:
  std::span<const std::byte> bytes_;
};

class FileReader final : public ImageReader {
 public:
  // Throws base::Error with what open or stat said; EINVAL for anything but a regular file.
  explicit FileReader(const std::string& path);
  uint64_t size() const noexcept override { return size_; }

 protected:
  void do_read(uint64_t offset, std::span<std::byte> out) const override;

 private:
  base::UniqueFd fd_;
  uint64_t size_ = 0;
};

}  // namespace minivmm::vmm
