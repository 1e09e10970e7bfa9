// SPDX-License-Identifier: Apache-2.0
// bare_fuse: the least that can serve one file over /dev/fuse, as the physical limit for a FUSE
// export: threads that read a request, pread or pwrite, and write the answer. The mount point is a
// file; needs root; unmounts itself on SIGTERM. Not a file system for data that matters.
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <string>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "args.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "clock.h"

namespace minivmm::bench {
namespace {

constexpr const char* kUsage =
    "usage: bare_fuse --file=PATH --mount=FILE [--threads=2] [--spin-us=0] [--clone]\n"
    "--clone gives each thread its own /dev/fuse queue end. Serves until SIGTERM.\n";

constexpr std::size_t kMaxData = 1 << 20;
constexpr std::size_t kHeader = 4096;

struct Shared {
  int file = -1;
  std::uint64_t size = 0;
  int device = -1;
  unsigned spin_us = 0;
};

// A blocking read wakes one waiting thread a request, poll wakes all: so only spinning polls.
int open_device(unsigned spin_us) {
  return ::open("/dev/fuse", O_RDWR | O_CLOEXEC | (spin_us > 0 ? O_NONBLOCK : 0));
}

class FuseWorker {
 public:
  FuseWorker(const Shared& shared, bool clone) : shared_(shared), in_(kMaxData + kHeader) {
    out_.resize(kMaxData);
    device_ = shared.device;
    if (!clone) return;
    own_.reset(open_device(shared.spin_us));
    std::uint32_t source = static_cast<std::uint32_t>(shared.device);
    if (!own_ || ::ioctl(own_.get(), FUSE_DEV_IOC_CLONE, &source) != 0) {
      throw base::errno_error(errno, "cannot clone /dev/fuse");
    }
    device_ = own_.get();
  }

  // Until the mount is gone.
  void serve() {
    while (receive()) answer();
  }

 private:
  bool receive();
  void answer();
  void answer_init();
  void answer_getattr();
  void answer_open();
  void answer_read();
  void answer_write();
  void reply(int error, const void* data, std::size_t size);

  template <typename T>
  const T& body() const {
    return *reinterpret_cast<const T*>(in_.data() + sizeof(fuse_in_header));
  }

  Shared shared_;
  base::UniqueFd own_;
  int device_ = -1;
  fuse_in_header head_{};
  std::vector<char> in_;
  std::vector<char> out_;
};

bool FuseWorker::receive() {
  std::uint64_t deadline = 0;
  for (;;) {
    const ssize_t n = ::read(device_, in_.data(), in_.size());
    if (n >= static_cast<ssize_t>(sizeof head_)) {
      std::memcpy(&head_, in_.data(), sizeof head_);
      return true;
    }
    if (n >= 0 || (errno != EAGAIN && errno != EINTR && errno != ENOENT)) return false;
    const std::uint64_t now = now_ns();
    if (deadline == 0) deadline = now + shared_.spin_us * 1000U;
    if (now < deadline) continue;
    pollfd p{device_, POLLIN, 0};
    ::poll(&p, 1, -1);
  }
}

void FuseWorker::reply(int error, const void* data, std::size_t size) {
  fuse_out_header out{};
  out.len = static_cast<std::uint32_t>(sizeof out + size);
  out.error = -error;
  out.unique = head_.unique;
  const iovec iov[2] = {{&out, sizeof out}, {const_cast<void*>(data), size}};
  // A request that was interrupted is gone by now; nobody waits for its answer.
  (void)!::writev(device_, iov, 2);
}

void FuseWorker::answer() {
  switch (head_.opcode) {
    case FUSE_INIT:
      return answer_init();
    case FUSE_GETATTR:
    case FUSE_SETATTR:
      return answer_getattr();
    case FUSE_OPEN:
      return answer_open();
    case FUSE_READ:
      return answer_read();
    case FUSE_WRITE:
      return answer_write();
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
      return;
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_DESTROY:
      return reply(0, nullptr, 0);
    case FUSE_FSYNC:
      return reply(::fdatasync(shared_.file) == 0 ? 0 : errno, nullptr, 0);
    default:
      return reply(ENOSYS, nullptr, 0);
  }
}

void FuseWorker::answer_init() {
  const auto& init = body<fuse_init_in>();
  fuse_init_out out{};
  out.major = FUSE_KERNEL_VERSION;
  out.minor = FUSE_KERNEL_MINOR_VERSION;
  out.max_readahead = init.max_readahead;
  out.flags = init.flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_ASYNC_DIO |
                            FUSE_PARALLEL_DIROPS);
  out.max_background = 256;
  out.congestion_threshold = 192;
  out.max_write = kMaxData;
  out.max_pages = kMaxData / 4096;
  out.time_gran = 1;
  reply(0, &out, sizeof out);
}

void FuseWorker::answer_getattr() {
  fuse_attr_out out{};
  out.attr_valid = 3600;
  out.attr.ino = 1;
  out.attr.size = shared_.size;
  out.attr.blocks = shared_.size / 512;
  out.attr.mode = S_IFREG | 0600;
  out.attr.nlink = 1;
  out.attr.blksize = 4096;
  reply(0, &out, sizeof out);
}

void FuseWorker::answer_open() {
  fuse_open_out out{};
  out.open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES;
  reply(0, &out, sizeof out);
}

void FuseWorker::answer_read() {
  const auto& r = body<fuse_read_in>();
  if (r.size > out_.size()) return reply(EINVAL, nullptr, 0);
  const ssize_t n = ::pread(shared_.file, out_.data(), r.size, static_cast<off_t>(r.offset));
  if (n < 0) return reply(errno, nullptr, 0);
  reply(0, out_.data(), static_cast<std::size_t>(n));
}

void FuseWorker::answer_write() {
  const auto& w = body<fuse_write_in>();
  const char* data = in_.data() + sizeof(fuse_in_header) + sizeof(fuse_write_in);
  if (w.size > kMaxData || w.offset > shared_.size || w.size > shared_.size - w.offset) {
    return reply(EFBIG, nullptr, 0);
  }
  const ssize_t n = ::pwrite(shared_.file, data, w.size, static_cast<off_t>(w.offset));
  if (n < 0) return reply(errno, nullptr, 0);
  fuse_write_out out{};
  out.size = static_cast<std::uint32_t>(n);
  reply(0, &out, sizeof out);
}

void mount_at(int device, const std::string& path) {
  const std::string options =
      "fd=" + std::to_string(device) + ",rootmode=100000,user_id=0,group_id=0,max_read=1048576";
  if (::mount("bare_fuse", path.c_str(), "fuse", MS_NOSUID | MS_NODEV, options.c_str()) != 0) {
    throw base::errno_error(errno, path + ": cannot mount");
  }
}

void run(const Args& args) {
  sigset_t ending;
  sigemptyset(&ending);
  sigaddset(&ending, SIGTERM);
  sigaddset(&ending, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &ending, nullptr);

  const std::string path = args.text("file", "");
  const std::string mount_point = args.text("mount", "");
  const base::UniqueFd file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  struct stat st {};
  if (!file || ::fstat(file.get(), &st) != 0) throw base::errno_error(errno, path);
  const auto spin_us = static_cast<unsigned>(args.number("spin-us", 0));
  const base::UniqueFd device(open_device(spin_us));
  if (!device) throw base::errno_error(errno, "/dev/fuse");
  mount_at(device.get(), mount_point);

  const Shared shared{file.get(), static_cast<std::uint64_t>(st.st_size), device.get(), spin_us};
  std::vector<std::unique_ptr<FuseWorker>> workers;
  std::vector<std::thread> threads;
  for (std::uint64_t i = 0; i < args.number("threads", 2); ++i) {
    workers.push_back(std::make_unique<FuseWorker>(shared, args.has("clone") && i > 0));
    threads.emplace_back([w = workers.back().get()] { w->serve(); });
  }
  int which = 0;
  ::sigwait(&ending, &which);
  ::umount2(mount_point.c_str(), MNT_FORCE | MNT_DETACH);
  for (std::thread& t : threads) t.join();
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  try {
    const minivmm::bench::Args args(argc, argv,
                                    {"file", "mount", "threads", "spin-us", "clone", "help"});
    if (args.has("help") || !args.has("file") || !args.has("mount")) {
      std::fputs(minivmm::bench::kUsage, stderr);
      return 2;
    }
    minivmm::bench::run(args);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bare_fuse: %s\n", e.what());
    return 1;
  }
  return 0;
}
