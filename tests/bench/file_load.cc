// SPDX-License-Identifier: Apache-2.0
// file_load: loads one file (on a FUSE mount, or the image itself as the floor) with reads or
// writes and prints what it measured as one JSON object, as nbd_load does. Depth 1 is pread and
// pwrite; more is Linux AIO, which keeps all requests of a FUSE file opened with O_DIRECT in
// flight, where io_uring would hand them to a few worker threads.
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "args.h"
#include "base/error.h"
#include "base/unique_fd.h"
#include "clock.h"
#include "histogram.h"
#include "load_plan.h"

namespace minivmm::bench {
namespace {

constexpr const char* kUsage =
    "usage: file_load PATH [--rw=randread|randwrite|randrw|read|write] [--bs=4096] [--depth=1]\n"
    "    [--seconds=1] [--ramp=0.1] [--range=BYTES] [--seed=1] [--buffered]\n"
    "The file is opened with O_DIRECT unless --buffered.\n";

struct Options {
  std::string path;
  LoadKind kind = LoadKind::kRandRead;
  std::size_t block_size = 4096;
  unsigned depth = 1;
  double seconds = 1;
  double ramp = 0.1;
  std::uint64_t range = 0;
  std::uint64_t seed = 1;
  bool buffered = false;
};

class FileLoad {
 public:
  explicit FileLoad(const Options& options);
  ~FileLoad();
  FileLoad(const FileLoad&) = delete;
  FileLoad& operator=(const FileLoad&) = delete;

  // Loads for the time given; latencies go to `latency`. Nothing is in flight afterwards.
  void run(double seconds, Histogram& latency);

 private:
  struct Slot {
    iocb control{};
    std::uint64_t start = 0;
    char* data = nullptr;
  };

  void one(Histogram& latency);
  void submit();
  void reap(Histogram& latency);
  iocb* prepare(Slot& slot, std::uint64_t now);

  Options options_;
  base::UniqueFd fd_;
  aio_context_t context_ = 0;
  std::unique_ptr<char, decltype(&::free)> memory_{nullptr, ::free};
  std::unique_ptr<LoadPlan> plan_;
  std::vector<Slot> slots_;
  std::vector<Slot*> free_;
  std::vector<iocb*> ready_;
  std::vector<io_event> events_;
};

FileLoad::FileLoad(const Options& options)
    : options_(options), slots_(options.depth), events_(options.depth) {
  const int direct = options_.buffered ? 0 : O_DIRECT;
  fd_.reset(::open(options_.path.c_str(), O_RDWR | O_CLOEXEC | direct));
  struct stat st {};
  if (!fd_ || ::fstat(fd_.get(), &st) != 0) throw base::errno_error(errno, options_.path);
  auto size = static_cast<std::uint64_t>(st.st_size);
  if (options_.range != 0) size = std::min(size, options_.range);
  if (size < options_.block_size) throw base::Error(EINVAL, options_.path + ": too small");
  plan_ = std::make_unique<LoadPlan>(options_.kind, 0, size / options_.block_size, options_.seed,
                                     nullptr);
  memory_.reset(static_cast<char*>(std::aligned_alloc(4096, options_.block_size * options_.depth)));
  std::memset(memory_.get(), 0x5a, options_.block_size * options_.depth);
  for (unsigned i = 0; i < options_.depth; ++i) {
    slots_[i].data = memory_.get() + i * options_.block_size;
    free_.push_back(&slots_[i]);
  }
  if (::syscall(SYS_io_setup, options_.depth, &context_) != 0) {
    throw base::errno_error(errno, "io_setup");
  }
}

FileLoad::~FileLoad() { ::syscall(SYS_io_destroy, context_); }

void FileLoad::run(double seconds, Histogram& latency) {
  const std::uint64_t deadline = now_ns() + static_cast<std::uint64_t>(seconds * 1e9);
  while (now_ns() < deadline) {
    if (options_.depth == 1) {
      one(latency);
      continue;
    }
    submit();
    reap(latency);
  }
  while (free_.size() < slots_.size()) reap(latency);
}

void FileLoad::one(Histogram& latency) {
  const LoadOp op = *plan_->next();
  const auto offset = static_cast<off_t>(op.block * options_.block_size);
  const std::uint64_t start = now_ns();
  const ssize_t n = op.write ? ::pwrite(fd_.get(), memory_.get(), options_.block_size, offset)
                             : ::pread(fd_.get(), memory_.get(), options_.block_size, offset);
  if (n != static_cast<ssize_t>(options_.block_size)) {
    throw base::errno_error(n < 0 ? errno : EIO, options_.path);
  }
  latency.add(now_ns() - start);
}

iocb* FileLoad::prepare(Slot& slot, std::uint64_t now) {
  const LoadOp op = *plan_->next();
  slot.start = now;
  slot.control = iocb{};
  slot.control.aio_fildes = static_cast<std::uint32_t>(fd_.get());
  slot.control.aio_lio_opcode = op.write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
  slot.control.aio_buf = reinterpret_cast<std::uint64_t>(slot.data);
  slot.control.aio_nbytes = options_.block_size;
  slot.control.aio_offset = static_cast<std::int64_t>(op.block * options_.block_size);
  slot.control.aio_data = reinterpret_cast<std::uint64_t>(&slot);
  return &slot.control;
}

void FileLoad::submit() {
  const std::uint64_t now = now_ns();
  ready_.clear();
  for (Slot* slot : free_) ready_.push_back(prepare(*slot, now));
  free_.clear();
  for (std::size_t done = 0; done < ready_.size();) {
    const long n = ::syscall(SYS_io_submit, context_, ready_.size() - done, ready_.data() + done);
    if (n <= 0) throw base::errno_error(errno, options_.path + ": io_submit");
    done += static_cast<std::size_t>(n);
  }
}

void FileLoad::reap(Histogram& latency) {
  const long n = ::syscall(SYS_io_getevents, context_, 1L, static_cast<long>(events_.size()),
                           events_.data(), nullptr);
  if (n < 0 && errno == EINTR) return;
  if (n < 0) throw base::errno_error(errno, "io_getevents");
  const std::uint64_t now = now_ns();
  for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
    auto* const slot = reinterpret_cast<Slot*>(events_[i].data);
    const auto result = static_cast<std::int64_t>(events_[i].res);
    if (result != static_cast<std::int64_t>(options_.block_size)) {
      throw base::errno_error(result < 0 ? static_cast<int>(-result) : EIO, options_.path);
    }
    latency.add(now - slot->start);
    free_.push_back(slot);
  }
}

Options options_of(const Args& args) {
  Options o;
  if (args.positional().size() != 1) throw base::Error(EINVAL, "give one path");
  o.path = args.positional().front();
  o.kind = parse_load_kind(args.text("rw", "randread"));
  o.block_size = args.number("bs", o.block_size);
  o.depth = static_cast<unsigned>(args.number("depth", o.depth));
  o.seconds = args.real("seconds", o.seconds);
  o.ramp = args.real("ramp", o.ramp);
  o.range = args.number("range", 0);
  o.seed = args.number("seed", o.seed);
  o.buffered = args.has("buffered");
  if (o.block_size < 4096 || o.block_size % 4096 != 0 || o.block_size > (4U << 20) ||
      o.depth == 0 || o.depth > 1024) {
    throw base::Error(EINVAL, "--bs is a multiple of 4096 up to 4M, --depth 1 to 1024");
  }
  return o;
}

void run(const Options& o) {
  FileLoad load(o);
  Histogram warm_up;
  load.run(o.ramp, warm_up);
  Histogram latency;
  const std::uint64_t start = now_ns();
  const double cpu = process_cpu_seconds();
  load.run(o.seconds, latency);
  const double seconds = static_cast<double>(now_ns() - start) * 1e-9;
  const double iops = static_cast<double>(latency.count()) / seconds;
  std::printf(
      "{\"iops\": %.1f, \"mb_per_s\": %.2f, \"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, "
      "\"p99\": %.2f, \"max\": %.2f}, \"requests\": %llu, \"errors\": 0, \"seconds\": %.3f, "
      "\"client_cpu_seconds\": %.3f}\n",
      iops, iops * static_cast<double>(o.block_size) / 1e6, latency.mean() / 1e3,
      static_cast<double>(latency.quantile(0.5)) / 1e3,
      static_cast<double>(latency.quantile(0.99)) / 1e3, static_cast<double>(latency.max()) / 1e3,
      static_cast<unsigned long long>(latency.count()), seconds, process_cpu_seconds() - cpu);
}

}  // namespace
}  // namespace minivmm::bench

int main(int argc, char** argv) {
  using namespace minivmm::bench;
  try {
    const Args args(argc, argv,
                    {"rw", "bs", "depth", "seconds", "ramp", "range", "seed", "buffered", "help"});
    if (args.has("help")) {
      std::fputs(kUsage, stderr);
      return 2;
    }
    run(options_of(args));
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "file_load: %s\n", e.what());
    return 1;
  }
}
