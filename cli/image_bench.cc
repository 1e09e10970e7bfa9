// SPDX-License-Identifier: Apache-2.0
// minivmm image bench
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <exception>
#include <mutex>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/error.h"
#include "base/sync.h"
#include "cli/command.h"
#include "cli/image_arguments.h"
#include "cli/image_commands.h"
#include "cli/image_open.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using Strings = std::vector<std::string>;

ImageSyntax image_bench_syntax() {
  return image_syntax(
      "Usage: minivmm image bench [options] FILE\n\n"
      "Sends requests to an image, one after the other in its range, and says how long they took.\n"
      "With -w what the image held there is overwritten.\n\n"
      "Examples:\n"
      "  minivmm image bench -c 100000 -d 32 disk.qcow2\n"
      "  minivmm image bench -w -t none -s 64k -f raw scratch.img\n\n",
      {
          {"count,c", "N", "how many requests (default 75000)"},
          {"depth,d", "N", "how many of them at once (default 64)"},
          {"buffer-size,s", "SIZE", "of a request (default 4k)"},
          {"step-size,S", "SIZE", "between requests (default: their size)"},
          {"offset,o", "OFFSET", "of the first one"},
          {"write,w", nullptr, "write instead of reading"},
          {"pattern", "BYTE", "what is written (default 0)"},
          {"flush-interval", "N", "flush after every N writes"},
          {"no-drain", nullptr, "accepted for qemu-img's sake: a flush holds no other request up"},
          {"native,n", nullptr, "accepted for qemu-img's sake, with -t none or directsync"},
          {"aio,i", "AIO", "accepted for qemu-img's sake: threads, native or io_uring"},
      },
      "ftiqU");
}

namespace {

struct BenchRequest {
  ImageName image;
  OpenMode mode;
  uint64_t count = 75000;
  uint64_t depth = 64;
  uint64_t size = 4096;
  uint64_t step = 0;
  uint64_t offset = 0;
  uint64_t flush_interval = 0;
  uint8_t pattern = 0;
  bool write = false;
};

uint64_t number(const po::variables_map& values, const char* name, const char* wrong,
                uint64_t otherwise, uint64_t most, uint64_t least = 0) {
  if (values.count(name) == 0) return otherwise;
  const std::string text = text_value(values, name);
  const bool digits = !text.empty() && text.size() < 19 &&
                      text.find_first_not_of("0123456789") == std::string::npos;
  const uint64_t value = digits ? std::stoull(text) : 0;
  if (digits && value <= most && value >= least) return value;
  throw Error(EINVAL, wrong);
}

void check_aio(const po::variables_map& values, const CacheMode& cache) {
  const std::string aio = is_set(values, "native") ? "native" : text_value(values, "aio");
  if (aio.empty() || aio == "threads" || aio == "io_uring") return;
  if (aio != "native") throw Error(EINVAL, fmt::format("Invalid aio option: {}", aio));
  if (cache.direct) return;
  throw Error(EINVAL, fmt::format("Could not open '{}': aio=native was specified, but it requires "
                                  "cache.direct=on, which was not specified.",
                                  one_file_name(values)));
}

BenchRequest read_request(const po::variables_map& values) {
  BenchRequest out;
  out.count = number(values, "count", "Invalid request count specified", out.count, INT_MAX);
  // A depth of 0 would never end.
  out.depth = number(values, "depth", "Invalid queue depth specified", out.depth, 65536, 1);
  out.size = size_value(values, "buffer-size", "buffer size", INT_MAX).value_or(out.size);
  out.step = size_value(values, "step-size", "step_size", INT_MAX).value_or(0);
  out.offset = size_value(values, "offset", "offset").value_or(0);
  out.pattern = static_cast<uint8_t>(
      number(values, "pattern", "Invalid pattern byte specified", 0, UINT8_MAX));
  out.flush_interval =
      number(values, "flush-interval", "Invalid flush interval specified", 0, INT_MAX);
  out.write = is_set(values, "write");
  out.image = one_image(values);
  if (!out.write && out.flush_interval != 0) {
    throw Error(EINVAL, "--flush-interval is only available in write tests");
  }
  if (out.flush_interval != 0 && out.flush_interval < out.depth) {
    throw Error(EINVAL, "Flush interval can't be smaller than depth");
  }
  if (out.size == 0) throw Error(EINVAL, "Invalid buffer size specified.");
  if (out.step == 0) out.step = out.size;
  out.mode.writable = out.write;
  out.mode.trusted = true;
  out.mode.force_share = is_set(values, "force-share");
  try {
    out.mode.cache = target_cache(values, "writeback");
  } catch (const Error&) {
    throw Error(EINVAL, "Invalid cache mode");
  }
  return out;
}

// The requests, dealt out to `depth` fibers of one loop.
class Bench {
 public:
  Bench(block::Edge& disk, uint64_t disk_size, const BenchRequest& request)
      : disk_(disk), disk_size_(disk_size), request_(request), at_(request.offset) {}

  // Fiber. Throws the first error.
  void run() {
    for (uint64_t i = 0; i < std::min(request_.depth, request_.count); ++i) {
      running_.add();
      base::EventLoop::current()->spawn("bench", [this] {
        work();
        running_.done();
      });
    }
    running_.wait();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    try {
      base::Buffer buffer(request_.size);
      std::memset(buffer.data(), request_.pattern, buffer.size());
      while (begun_ < request_.count && !error_) {
        ++begun_;
        const uint64_t at = next();
        if (request_.write) {
          disk_.write(at, buffer.io());
        } else {
          disk_.read(at, buffer.io());
        }
        ++ended_;
        if (request_.flush_interval != 0 && ended_ % request_.flush_interval == 0) disk_.flush();
      }
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
  }

  // As qemu-img: round and round, from where the last one would reach past the end.
  uint64_t next() {
    if (disk_size_ <= request_.size) return 0;
    if (at_ + request_.size > disk_size_) at_ %= disk_size_ - request_.size;
    const uint64_t at = at_;
    at_ += request_.step;
    return at;
  }

  block::Edge& disk_;
  const uint64_t disk_size_;
  const BenchRequest& request_;
  uint64_t at_;
  uint64_t begun_ = 0;
  uint64_t ended_ = 0;
  std::exception_ptr error_;
  base::WaitGroup running_;
};

void announce(const BenchRequest& request) {
  fmt::print(
      "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size "
      "{})\n",
      request.count, request.write ? "write" : "read", request.size, request.depth, request.offset,
      request.step);
  if (request.flush_interval != 0) {
    fmt::print("Sending flush every {} requests\n", request.flush_interval);
  }
  std::fflush(stdout);
}

// Fiber.
void bench(ImageGraph& graph, const BenchRequest& request) {
  OpenImage image(graph, request.image, request.mode);
  if (image.size() < request.size) {
    throw Error(EINVAL, fmt::format("{}: is smaller than a request", request.image.text));
  }
  announce(request);
  const auto began = std::chrono::steady_clock::now();
  Bench(image.edge(), image.size(), request).run();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  fmt::print("Run completed in {:.3f} seconds.\n", seconds.count());
  image.close();
}

}  // namespace

int run_image_bench(const po::variables_map& values) {
  const BenchRequest request = read_request(values);
  check_aio(values, request.mode.cache);
  ImageGraph graph;
  graph.run([&] { bench(graph, request); });
  return 0;
}

}  // namespace minivmm::cli
