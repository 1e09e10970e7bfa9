// SPDX-License-Identifier: Apache-2.0
// Writing compressed clusters. The work is done in the pool, before the cluster is claimed; what
// does not become smaller is written as it is.
#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/pool.h"
#include "block/formats/qcow2/compress.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

using base::Error;
using qcow2::Claims;
using qcow2::L2Entry;

void Qcow2Node::driver_write_compressed(uint64_t offset, IoSpan from) {
  const qcow2::Geometry& g = geometry();
  if (g.external_data) {
    throw Error(ENOTSUP, describe() + ": an external data file holds no compressed clusters");
  }
  if (image_.encryption() != nullptr) {
    throw Error(ENOTSUP, describe() + ": an encrypted image holds no compressed clusters");
  }
  const uint64_t end = offset + from.bytes();
  if (g.offset_in_cluster(offset) != 0 || (g.offset_in_cluster(end) != 0 && end != size())) {
    throw Error(EINVAL, fmt::format("{}: {} bytes at {:#x} are not whole clusters of {}, which is "
                                    "what can be compressed",
                                    describe(), from.bytes(), offset, g.cluster_size()));
  }
  before_change(offset, from.bytes());
  for (uint64_t done = 0; done < from.bytes();) {
    const uint64_t now = std::min(g.cluster_size(), from.bytes() - done);
    compress_cluster(offset + done, from, done, now);
    done += now;
    after_change(false);
  }
}

// `length` bytes of `from`, from byte `at` on: a cluster, or the last of the disk.
void Qcow2Node::compress_cluster(uint64_t offset, IoSpan from, uint64_t at, uint64_t length) {
  const uint64_t cluster_size = geometry().cluster_size();
  qcow2::ClusterBuffers::Lease buffers(compress_buffers_, cluster_size);
  base::Buffer& plain = buffers.plain();
  base::Buffer& packed = buffers.packed();
  {
    base::IoList list;
    base::copy_from(base::slice(from, at, length, list), 0, plain.span().first(length));
  }
  std::fill(plain.data() + length, plain.data() + cluster_size, std::byte{0});
  // One that saves nothing costs its readers all the same.
  const size_t size = base::Pool::work().run([&] {
    return qcow2::compress(header().compression, plain.span(),
                           packed.span().first(cluster_size - 1));
  });
  const base::Epoch::Pin pin(epoch_);
  require_inside(offset, length);
  // The last cluster is whole for as long as the disk ends in it.
  const bool whole = length == cluster_size || offset + length == end_.load();
  if (!whole || size == 0 || !store_compressed(offset, packed.span().first(size))) {
    write_range(offset, base::SingleBuffer(std::span<const std::byte>(plain.span().first(length))));
  }
}

// False: there is no room where a compressed entry can point to.
bool Qcow2Node::store_compressed(uint64_t offset, std::span<const std::byte> bytes) {
  const qcow2::Geometry& g = geometry();
  const uint64_t cluster = offset >> g.cluster_bits;
  const Claims::Claim claim(claims_, image_.map().claim_group(cluster), cluster, 1);
  const qcow2::SliceRange entries = image_.map().writable(cluster);
  qcow2::RawL2 raw;
  image_.l2().read(entries.slice,
                   [&](const std::byte* slice) { raw = load_l2(slice + entries.position, g); });
  const L2Entry old = qcow2::decode_l2(raw, g, offset);
  if (old.problem != nullptr) throw image_.map().invalid_entry(offset, raw, old.problem);
  const uint64_t host = image_.bytes().take(bytes.size());
  const qcow2::RawL2 wanted = qcow2::compressed_l2(host, bytes.size(), g);
  const L2Entry entry = qcow2::decode_l2(wanted, g, offset);
  const bool fits = entry.problem == nullptr && entry.host_offset == host;
  std::exception_ptr error;
  try {
    if (fits) {
      image_.require_data(host, bytes.size());
      file().write(host, base::SingleBuffer(bytes));
    }
  } catch (...) {
    error = std::current_exception();
  }
  if (error || !fits) {
    const uint64_t first = host >> g.cluster_bits;
    image_.drop({first, ((host + bytes.size() - 1) >> g.cluster_bits) - first + 1});
    if (error) std::rethrow_exception(error);
    return false;
  }
  image_.l2().change(entries.slice, [&](std::byte* slice) {
    qcow2::store_l2(slice + entries.position, wanted, g);
    return true;
  });
  image_.drop(clusters_of(old, g));
  return true;
}

}  // namespace minivmm::block
