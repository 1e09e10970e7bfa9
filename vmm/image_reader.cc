// SPDX-License-Identifier: Apache-2.0
#include "vmm/image_reader.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"

namespace minivmm::vmm {

void ImageReader::read(uint64_t offset, std::span<std::byte> out, const char* what) const {
  if (!base::range_fits(offset, out.size(), size())) {
    throw base::Error(EINVAL, fmt::format("{}: truncated: {} needs {} bytes at {:#x}, the file has "
                                          "{} bytes",
                                          name_, what, out.size(), offset, size()));
  }
  if (!out.empty()) do_read(offset, out);
}

void SpanReader::do_read(uint64_t offset, std::span<std::byte> out) const {
  std::memcpy(out.data(), bytes_.data() + offset, out.size());
}

FileReader::FileReader(const std::string& path) : ImageReader(path) {
  // O_NONBLOCK so that a FIFO named by mistake is reported instead of waited for.
  fd_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd_) throw base::errno_error(errno, fmt::format("{}: cannot open", path));
  struct stat st {};
  if (::fstat(fd_.get(), &st) != 0) throw base::errno_error(errno, fmt::format("{}: fstat", path));
  if (!S_ISREG(st.st_mode)) {
    throw base::Error(EINVAL, fmt::format("{}: not a regular file", path));
  }
  size_ = static_cast<uint64_t>(st.st_size);
}

void FileReader::do_read(uint64_t offset, std::span<std::byte> out) const {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n =
        ::pread(fd_.get(), out.data() + done, out.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw base::errno_error(errno, fmt::format("{}: cannot read", name()));
    if (n == 0) {
      throw base::Error(EINVAL, fmt::format("{}: became shorter while it was read", name()));
    }
    done += static_cast<size_t>(n);
  }
}

}  // namespace minivmm::vmm
