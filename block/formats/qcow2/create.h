// SPDX-License-Identifier: Apache-2.0
// Making a new qcow2 image in an empty file.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <vector>

#include "block/crypto/luks1_create.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/layout.h"
#include "block/graph/edge.h"
#include "block/graph/options.h"

namespace minivmm::block::qcow2 {

using block::Preallocation;

struct CreateOptions {
  uint64_t size = 0;  // of the disk, bytes; rounded up to 512
  unsigned version = 3;
  unsigned cluster_bits = 16;
  unsigned refcount_order = 4;
  Compression compression = Compression::kZlib;
  bool extended_l2 = false;
  bool lazy_refcounts = false;
  Preallocation preallocation = Preallocation::kOff;
  std::string data_file = {};     // the external data file, as it is to be recorded; empty: none
  bool data_file_raw = false;     // it is a raw image by itself
  std::string backing_file = {};  // as it is to be recorded; empty: none
  std::string backing_format = {};
  // Encrypted by method 2, or by method 1 with the password of a secret (its id).
  std::optional<crypto::Luks1CreateOptions> luks = {};
  std::string aes_secret = {};

  bool encrypted() const noexcept { return luks || !aes_secret.empty(); }
  uint64_t cluster_size() const noexcept { return 1ULL << cluster_bits; }
  Geometry geometry() const noexcept {
    return {cluster_bits, refcount_order, version, extended_l2, !data_file.empty()};
  }
};

// Takes qemu-img's -o options: size, compat, cluster_size, refcount_bits, extended_l2,
// data_file, data_file_raw, compression_type, lazy_refcounts, preallocation, backing_file,
// backing_fmt, encrypt.format and the other options under "encrypt". Throws EINVAL. `size` stays 0
// where it is not given (the caller may know the backing file's).
CreateOptions take_create_options(Options& options);

// The feature name table of new images of version 3.
std::vector<FeatureName> known_features();

// Throws EINVAL, in qemu-img's words where it has some.
void check_create_options(const CreateOptions& options);

// Makes the file hold an empty image; what it held is lost. The edge may write and resize. Durable
// on return. After an error the file holds no image. `data` is the external data file where the
// options name one: it is emptied as well, and gets the disk's size. Fiber.
void create_image(Edge& file, const CreateOptions& options, Edge* data = nullptr);

}  // namespace minivmm::block::qcow2
