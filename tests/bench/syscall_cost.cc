// SPDX-License-Identifier: Apache-2.0
#include "syscall_cost.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "ring.h"

namespace minivmm::bench {
namespace {

constexpr std::size_t kBlock = 4096;

void must(bool ok, const char* what) {
  if (!ok) throw base::errno_error(errno, what);
}

class Offsets {
 public:
  explicit Offsets(std::uint64_t blocks) : blocks_(blocks) {}
  // A random block's byte offset.
  off_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<off_t>(state_ % blocks_ * kBlock);
  }

 private:
  std::uint64_t blocks_;
  std::uint64_t state_ = 0x9e3779b97f4a7c15U;
};

base::UniqueFd make_file(const CostOptions& o) {
  base::UniqueFd fd(::open(o.file.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  must(fd.get() >= 0, "cannot create the scratch file");
  std::vector<char> buffer(1 << 20, 'x');
  for (std::uint64_t done = 0; done < o.blocks * kBlock; done += buffer.size()) {
    must(::write(fd.get(), buffer.data(), buffer.size()) == static_cast<ssize_t>(buffer.size()),
         "cannot fill the scratch file");
  }
  ::fsync(fd.get());
  return fd;
}

void plain_costs(const CostOptions& o, int fd) {
  alignas(64) static char buffer[kBlock];
  Offsets at(o.blocks);
  cost(o, "getppid (an empty system call)", 1, [] { ::syscall(SYS_getppid); });
  cost(o, "clock_gettime (vdso)", 1, [] { (void)now_ns(); });
  cost(o, "memcpy 4 KiB, hot", 1, [] {
    static char other[kBlock];
    std::memcpy(other, buffer, kBlock);
    asm volatile("" ::"r"(other) : "memory");
  });
  cost(o, "pread 4 KiB cached, random", 1,
       [&] { must(::pread(fd, buffer, kBlock, at.next()) == kBlock, "pread"); });
  iovec iov{buffer, kBlock};
  cost(o, "preadv2 RWF_NOWAIT 4 KiB cached, random", 1,
       [&] { must(::preadv2(fd, &iov, 1, at.next(), RWF_NOWAIT) == kBlock, "preadv2"); });
  cost(o, "pread 4 KiB cached, same block", 1,
       [&] { must(::pread(fd, buffer, kBlock, 0) == kBlock, "pread"); });
  cost(o, "pwrite 4 KiB cached, random", 1,
       [&] { must(::pwrite(fd, buffer, kBlock, at.next()) == kBlock, "pwrite"); });
  cost(o, "pwrite 4 KiB cached, same block", 1,
       [&] { must(::pwrite(fd, buffer, kBlock, 0) == kBlock, "pwrite"); });
  static char large[64 * kBlock];
  cost(o, "pread 256 KiB cached (per call)", 1, [&] {
    must(::pread(fd, large, sizeof large, 0) == static_cast<ssize_t>(sizeof large), "pread");
  });
  cost(o, "pwrite 256 KiB cached (per call)", 1, [&] {
    must(::pwrite(fd, large, sizeof large, 0) == static_cast<ssize_t>(sizeof large), "pwrite");
  });
  std::vector<iovec> many(32, iovec{buffer, kBlock});
  cost(o, "preadv 32 x 4 KiB adjacent, cached (per 4 KiB)", 32,
       [&] { must(::preadv(fd, many.data(), 32, at.next() / 2) > 0, "preadv"); });
  cost(o, "pwritev 32 x 4 KiB adjacent, cached (per 4 KiB)", 32,
       [&] { must(::pwritev(fd, many.data(), 32, at.next() / 2) > 0, "pwritev"); });
  cost(o, "lseek SEEK_DATA", 1, [&] { must(::lseek(fd, 0, SEEK_DATA) >= 0, "lseek"); });
}

void ring_batch(const CostOptions& o, int fd, unsigned batch, bool writing, bool fixed) {
  Ring ring(64);
  std::vector<char> memory(kBlock * batch);
  iovec whole{memory.data(), memory.size()};
  const int file = fixed ? 0 : fd;
  if (fixed) {
    must(io_uring_register_files(ring.get(), &fd, 1) == 0, "register the file");
    must(io_uring_register_buffers(ring.get(), &whole, 1) == 0, "register the buffers");
  }
  Offsets at(o.blocks);
  char name[96];
  std::snprintf(name, sizeof name, "io_uring %s 4 KiB cached, batch %u%s (per op)",
                writing ? "write" : "read", batch, fixed ? ", fixed file+buffer" : "");
  cost(o, name, batch, [&] {
    for (unsigned i = 0; i < batch; ++i) {
      io_uring_sqe* e = ring.sqe();
      char* p = memory.data() + i * kBlock;
      const auto offset = static_cast<std::uint64_t>(at.next());
      if (writing && fixed) {
        io_uring_prep_write_fixed(e, file, p, kBlock, offset, 0);
      } else if (writing) {
        io_uring_prep_write(e, file, p, kBlock, offset);
      } else if (fixed) {
        io_uring_prep_read_fixed(e, file, p, kBlock, offset, 0);
      } else {
        io_uring_prep_read(e, file, p, kBlock, offset);
      }
      if (fixed) e->flags |= IOSQE_FIXED_FILE;
    }
    unsigned left = batch;
    while (left > 0) {
      ring.submit(left);
      left -= ring.reap([](std::uint64_t, int result, unsigned) {
        if (result != static_cast<int>(kBlock)) {
          throw base::errno_error(result < 0 ? -result : EIO, "ring read or write");
        }
      });
    }
  });
}

void ring_costs(const CostOptions& o, int fd) {
  {
    Ring ring(64);
    cost(o, "io_uring nop, batch 1 (per op)", 1, [&] {
      io_uring_prep_nop(ring.sqe());
      ring.submit(1);
      ring.reap([](std::uint64_t, int, unsigned) {});
    });
    cost(o, "io_uring nop, batch 32 (per op)", 32, [&] {
      for (int i = 0; i < 32; ++i) io_uring_prep_nop(ring.sqe());
      ring.submit(32);
      ring.reap([](std::uint64_t, int, unsigned) {});
    });
  }
  for (const unsigned batch : {1U, 8U, 32U}) ring_batch(o, fd, batch, false, false);
  for (const unsigned batch : {1U, 32U}) ring_batch(o, fd, batch, false, true);
  for (const unsigned batch : {1U, 8U, 32U}) ring_batch(o, fd, batch, true, false);
  ring_batch(o, fd, 32, true, true);
}

void socket_costs(const CostOptions& o) {
  int pair[2];
  must(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
  base::UniqueFd a(pair[0]);
  base::UniqueFd b(pair[1]);
  const int size = 4 << 20;
  for (const int fd : pair) {
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
  }
  static char data[160 * 1024];
  const auto send_recv = [&](const char* what, std::size_t bytes) {
    cost(o, what, 1, [&] {
      must(::send(pair[0], data, bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes), "send");
      std::size_t got = 0;
      while (got < bytes) {
        const ssize_t n = ::recv(pair[1], data, sizeof data, 0);
        must(n > 0, "recv");
        got += static_cast<std::size_t>(n);
      }
    });
  };
  send_recv("unix socket, one thread: send + recv of 28 bytes", 28);
  send_recv("unix socket, one thread: send + recv of 32 x 28 bytes", 28 * 32);
  send_recv("unix socket, one thread: send + recv of 4 KiB", kBlock);
  send_recv("unix socket, one thread: send + recv of 32 x (4096 + 16)", (kBlock + 16) * 32);
  cost(o, "recv MSG_DONTWAIT on an empty unix socket (EAGAIN)", 1,
       [&] { (void)::recv(pair[1], data, sizeof data, MSG_DONTWAIT); });
  const base::UniqueFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  cost(o, "eventfd write + read, one thread (2 calls)", 1, [&] {
    std::uint64_t v = 1;
    must(::write(event.get(), &v, sizeof v) == sizeof v, "eventfd write");
    must(::read(event.get(), &v, sizeof v) == sizeof v, "eventfd read");
  });
}

// Pages moved instead of copied, and mapped pages: the ways around the copy of a cached read.
void copy_costs(const CostOptions& o, int fd) {
  int pair[2];
  must(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
  base::UniqueFd a(pair[0]);
  base::UniqueFd b(pair[1]);
  int pipe_fds[2];
  must(::pipe2(pipe_fds, O_CLOEXEC) == 0, "pipe");
  base::UniqueFd r(pipe_fds[0]);
  base::UniqueFd w(pipe_fds[1]);
  static char data[kBlock];
  Offsets at(o.blocks);
  cost(o, "splice file->pipe->unix socket, recv: 4 KiB (3 calls)", 1, [&] {
    off_t offset = at.next();
    must(::splice(fd, &offset, w.get(), nullptr, kBlock, 0) == kBlock, "splice in");
    must(::splice(r.get(), nullptr, a.get(), nullptr, kBlock, 0) == kBlock, "splice out");
    must(::recv(b.get(), data, kBlock, MSG_WAITALL) == kBlock, "recv");
  });
  cost(o, "pread + send + recv: 4 KiB (3 calls)", 1, [&] {
    must(::pread(fd, data, kBlock, at.next()) == kBlock, "pread");
    must(::send(a.get(), data, kBlock, MSG_NOSIGNAL) == kBlock, "send");
    must(::recv(b.get(), data, kBlock, MSG_WAITALL) == kBlock, "recv");
  });
}

void mapped_costs(const CostOptions& o, int fd) {
  const std::size_t size = o.blocks * kBlock;
  void* const mapped = ::mmap(nullptr, size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
  must(mapped != MAP_FAILED, "mmap");
  const char* const base = static_cast<const char*>(mapped);
  static char data[kBlock];
  Offsets at(o.blocks);
  cost(o, "memcpy 4 KiB out of the mapped file, random", 1, [&] {
    std::memcpy(data, base + at.next(), kBlock);
    asm volatile("" ::"r"(data) : "memory");
  });
  ::munmap(mapped, size);
}

void run(const CostOptions& o) {
  std::printf("%-64s %9s %9s %9s\n", "cost in ns", "least", "median", "p90");
  const base::UniqueFd fd = make_file(o);
  ::unlink(o.file.c_str());
  plain_costs(o, fd.get());
  ring_costs(o, fd.get());
  socket_costs(o);
  copy_costs(o, fd.get());
  mapped_costs(o, fd.get());
  thread_costs(o);
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  if (argc > 3) {
    std::fprintf(stderr, "usage: syscall_cost [DIRECTORY for a scratch file [SLICES]]\n");
    return 2;
  }
  minivmm::bench::CostOptions options;
  options.file = std::string(argc > 1 ? argv[1] : "/var/tmp") + "/minivmm-syscall-cost";
  options.blocks = (256U << 20) / 4096U;
  if (argc > 2) options.slices = static_cast<unsigned>(std::max(1, std::atoi(argv[2])));
  try {
    minivmm::bench::run(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "syscall_cost: %s\n", e.what());
    return 1;
  }
  return 0;
}
