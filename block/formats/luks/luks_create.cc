// SPDX-License-Identifier: Apache-2.0
#include "block/formats/luks/luks_create.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/crypto/secret.h"

namespace minivmm::block::luks {

using base::Error;

CreateOptions take_create_options(Options& options) {
  CreateOptions out;
  out.size = options.take_size("size").value_or(0);
  out.crypto = crypto::take_luks1_create_options(options);
  return out;
}

void create_image(Edge& file, const CreateOptions& options) {
  const uint64_t payload = crypto::luks1_header_bytes(options.crypto);
  if (options.size > kMaxDiskSize - payload - crypto::kSectorSize) {
    throw Error(EFBIG, "The image size is too large for file format 'luks'");
  }
  // Before anything is lost: there is a password.
  (void)crypto::secrets().get_text(options.crypto.key_secret);
  const uint64_t whole = payload + base::align_up<uint64_t>(options.size, crypto::kSectorSize);
  try {
    file.truncate(0);
    file.truncate(whole);
  } catch (const Error& e) {
    if (e.err() != ENOTSUP) throw;
    if (file.size() < whole) {
      throw Error(ENOSPC,
                  fmt::format("The device has {} bytes, fewer than the {} that the disk and "
                              "its LUKS header take",
                              file.size(), whole));
    }
  }
  crypto::LuksArea area(file, 0, payload);
  (void)crypto::create_luks1(area, options.crypto);
}

}  // namespace minivmm::block::luks
