// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/header_update.h"

#include <utility>

namespace minivmm::block::qcow2 {

HeaderUpdate::HeaderUpdate(Edge& file, Header header) : file_(file), header_(std::move(header)) {}

Header HeaderUpdate::current() const {
  const std::lock_guard lock(changing_);
  return header_;
}

void HeaderUpdate::change_numbers(const Change& change) {
  const std::lock_guard lock(changing_);
  Header wanted = header_;
  change(wanted);
  const std::vector<std::byte> fields = serialise_fields(wanted);
  const uint64_t end = wanted.version >= 3 ? kNumbersEndV3 : kNumbersEndV2;
  write(kSizeField, std::span(fields).subspan(kSizeField, end - kSizeField));
  header_ = std::move(wanted);
}

void HeaderUpdate::rewrite(const Change& change) {
  const std::lock_guard lock(changing_);
  Header wanted = header_;
  change(wanted);
  std::vector<std::byte> bytes = serialise_header(wanted);
  // To the end of its sector: what was there before may have been longer, and zeroes end it.
  bytes.resize((bytes.size() + 511) & ~size_t{511});
  write(0, bytes);
  header_ = std::move(wanted);
}

void HeaderUpdate::write(uint64_t offset, std::span<const std::byte> bytes) {
  file_.write(offset, base::SingleBuffer(bytes));
  file_.flush();
}

}  // namespace minivmm::block::qcow2
