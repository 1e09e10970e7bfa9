// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/decompress.h"

#include <memory>
#include <new>

#include <zlib.h>
#include <zstd.h>

namespace minivmm::block::qcow2 {
namespace {

// Contexts are kept per thread of the pool: making one costs more than a cluster does.
class Inflater {
 public:
  Inflater() {
    // Negative: raw deflate, without zlib's header. QEMU writes 4 KiB windows; accept all.
    if (inflateInit2(&stream_, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
  }
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  const char* run(std::span<const std::byte> in, std::span<std::byte> out) {
    if (inflateReset(&stream_) != Z_OK) return "zlib cannot be reset";
    // SAFETY: zlib wants mutable pointers and characters; it only reads the input.
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    const int result = inflate(&stream_, Z_FINISH);
    // Z_BUF_ERROR with a full output: the stream goes on past a cluster, which is all we take.
    if (stream_.avail_out == 0 && (result == Z_STREAM_END || result == Z_BUF_ERROR)) {
      return nullptr;
    }
    if (result == Z_MEM_ERROR) throw std::bad_alloc();
    return result == Z_DATA_ERROR ? "the deflate data is damaged"
                                  : "the deflate data ends before a cluster is full";
  }

 private:
  z_stream stream_{};
};

struct FreeZstd {
  void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
};

const char* run_zstd(std::span<const std::byte> in, std::span<std::byte> out) {
  // A frame states its window, and the decoder allocates that much: 8 MiB is more than any
  // compressor needs for a cluster of at most 2 MiB.
  constexpr int kMaxWindowLog = 23;
  thread_local std::unique_ptr<ZSTD_DCtx, FreeZstd> context;
  if (!context) {
    context.reset(ZSTD_createDCtx());
    if (!context) throw std::bad_alloc();
    ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, kMaxWindowLog);
  }
  ZSTD_DCtx_reset(context.get(), ZSTD_reset_session_only);
  ZSTD_inBuffer input{in.data(), in.size(), 0};
  ZSTD_outBuffer output{out.data(), out.size(), 0};
  while (output.pos < output.size) {
    const size_t in_before = input.pos;
    const size_t out_before = output.pos;
    const size_t result = ZSTD_decompressStream(context.get(), &output, &input);
    if (ZSTD_isError(result)) return "the zstd data is damaged";
    if (output.pos == output.size) break;
    // Frames may follow each other; no progress means that the input has run out.
    if (input.pos == in_before && output.pos == out_before) {
      return "the zstd data ends before a cluster is full";
    }
  }
  return nullptr;
}

}  // namespace

const char* decompress(Compression kind, std::span<const std::byte> in, std::span<std::byte> out) {
  if (kind == Compression::kZstd) return run_zstd(in, out);
  thread_local Inflater inflater;
  return inflater.run(in, out);
}

}  // namespace minivmm::block::qcow2
