// SPDX-License-Identifier: Apache-2.0
// What the kernel's FUSE protocol has and the system's headers or libfuse may be too old to know.
// The numbers are the kernel's (include/uapi/linux/fuse.h, protocol 7.39 and later).
#pragma once

#include <cstddef>
#include <cstdint>

namespace minivmm::fuse {

// INIT reply, bits of flags and flags2: shared mmap of files opened with direct I/O.
inline constexpr uint32_t kInitExt = 1U << 30;
inline constexpr uint32_t kInit2DirectIoAllowMmap = 1U << (36 - 32);
// OPEN reply: the kernel need not send one direct write of a file at a time.
inline constexpr uint32_t kOpenParallelDirectWrites = 1U << 6;

// The largest READ and WRITE: 256 pages, the kernel's default bound (fs.fuse.max_pages_limit).
inline constexpr size_t kMaxTransfer = size_t{1} << 20;
// fuse_in_header and fuse_write_in (or fuse_read_in, of the same size) before a WRITE's data.
inline constexpr size_t kRequestHeader = 80;
inline constexpr size_t kReplyHeader = 16;  // fuse_out_header

}  // namespace minivmm::fuse
