// SPDX-License-Identifier: Apache-2.0
#include "fuse/session.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "fuse/channel.h"
#include "fuse/kernel_abi.h"
#include "fuse/mountpoint.h"
#include "fuse/operations.h"

namespace minivmm::fuse {
namespace {

using base::errno_error;
using base::Error;

// libfuse's messages go where ours go. They are few: it speaks only when something is wrong.
void log_libfuse(fuse_log_level level, const char* format, va_list arguments) {
  char text[512];
  const int length = std::vsnprintf(text, sizeof text, format, arguments);
  if (length <= 0) return;
  std::string_view line(text);
  while (!line.empty() && line.back() == '\n') line.remove_suffix(1);
  base::log(level <= FUSE_LOG_WARNING ? base::LogLevel::kWarning : base::LogLevel::kDebug,
            "libfuse: {}", line);
}

// We read the device ourselves.
ssize_t refuse_read(int, void*, size_t, void*) {
  errno = ENOSYS;
  return -1;
}

}  // namespace

Session::~Session() {
  if (session_ != nullptr) ::fuse_session_destroy(session_);
}

void Session::mount(const std::string& path, bool allow_other) {
  ::fuse_set_log_func(&log_libfuse);
  // default_permissions: the kernel checks mode, uid and gid, which knows supplementary groups.
  const std::string options =
      fmt::format("fsname={},subtype=minivmm,default_permissions,nosuid,nodev,noatime{}",
                  mount_source(), allow_other ? ",allow_other" : "");
  const char* const arguments[] = {"minivmm", "-o", options.c_str()};
  fuse_args args{3, const_cast<char**>(arguments), 0};
  const fuse_lowlevel_ops operations = make_operations();
  session_ = ::fuse_session_new(&args, &operations, sizeof operations, this);
  ::fuse_opt_free_args(&args);
  if (session_ == nullptr) throw Error(ENOMEM, path + ": libfuse refuses the session");
  errno = 0;
  if (::fuse_session_mount(session_, path.c_str()) != 0) {
    const int error = errno != 0 ? errno : EPERM;
    throw errno_error(error, path +
                                 ": cannot mount (is /dev/fuse there, and fusermount3 for those "
                                 "who are not root?)");
  }
  fuse_custom_io io{};  // newer libraries have more members
  io.writev = &Session::write_reply;
  io.read = &refuse_read;
  const int error = ::fuse_session_custom_io(session_, &io, ::fuse_session_fd(session_));
  if (error != 0) throw errno_error(-error, path + ": libfuse refuses our I/O functions");
  invalidator_ = std::make_shared<Invalidator>(clone_device());
}

void Session::abandon_mount() noexcept {
  if (session_ != nullptr) ::fuse_session_unmount(session_);
}

base::UniqueFd Session::clone_device() const {
  base::UniqueFd device(::open("/dev/fuse", O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!device) throw errno_error(errno, "/dev/fuse");
  uint32_t original = static_cast<uint32_t>(::fuse_session_fd(session_));
  if (::ioctl(device.get(), FUSE_DEV_IOC_CLONE, &original) != 0) {
    throw errno_error(errno, "/dev/fuse: FUSE_DEV_IOC_CLONE");
  }
  return device;
}

void Session::process(std::span<std::byte> request) {
  fuse_buf buffer{};
  buffer.size = request.size();
  buffer.mem = request.data();
  buffer.fd = -1;
  ::fuse_session_process_buf(session_, &buffer);
}

// libfuse always names its own descriptor; the request came through the one of this loop.
ssize_t Session::write_reply(int, iovec* iov, int count, void* user_data) {
  auto& self = *static_cast<Session*>(user_data);
  self.amend_reply(iov, count);
  const int error = self.channel().send(iov, count);
  if (error == 0) return 1;
  errno = error;
  return -1;
}

// Adds what libfuse 3.14 does not know to the replies to INIT and OPEN, which are made while the
// request is being processed.
void Session::amend_reply(iovec* iov, int count) {
  const Channel& from = channel();
  if (count < 2 || iov[0].iov_len < sizeof(fuse_out_header)) return;
  fuse_out_header header{};
  std::memcpy(&header, iov[0].iov_base, sizeof header);
  if (header.error != 0 || header.unique != from.processing_unique()) return;
  if (from.processing_opcode() == FUSE_OPEN && iov[1].iov_len >= sizeof(fuse_open_out)) {
    auto* out = static_cast<fuse_open_out*>(iov[1].iov_base);
    out->open_flags |= kOpenParallelDirectWrites;
  }
  if (from.processing_opcode() == FUSE_INIT && iov[1].iov_len >= sizeof(fuse_init_out)) {
    auto* out = static_cast<fuse_init_out*>(iov[1].iov_base);
    out->flags |= kInitExt;
    out->flags2 |= kInit2DirectIoAllowMmap;
  }
}

}  // namespace minivmm::fuse
