// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/header_update.h"

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "block/formats/qcow2/header_sectors.h"

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
  write_numbers(wanted);
  header_ = std::move(wanted);
}

void HeaderUpdate::write_numbers(const Header& wanted) {
  const std::vector<std::byte> fields = serialise_fields(wanted);
  const uint64_t end = wanted.version >= 3 ? kNumbersEndV3 : kNumbersEndV2;
  write(kSizeField, std::span(fields).subspan(kSizeField, end - kSizeField));
}

namespace {

// `header` over the beginning of what is there. What was there before may have been longer, and
// zeroes to the end of the sector end it.
std::vector<std::byte> over(std::vector<std::byte> there, const std::vector<std::byte>& header) {
  const size_t end = (header.size() + kHeaderSector - 1) / kHeaderSector * kHeaderSector;
  there.resize(std::max(there.size(), end));
  std::copy(header.begin(), header.end(), there.begin());
  std::fill(there.begin() + static_cast<std::ptrdiff_t>(header.size()),
            there.begin() + static_cast<std::ptrdiff_t>(end), std::byte{0});
  return there;
}

}  // namespace

void HeaderUpdate::rewrite(const Change& change) {
  const std::lock_guard lock(changing_);
  Header wanted = header_;
  change(wanted);
  const std::vector<std::byte> header = serialise_header(wanted);
  std::vector<std::byte> now(std::min(uint64_t{1} << wanted.cluster_bits, file_.size()));
  file_.read(0, base::SingleBuffer(now.data(), now.size()));
  std::vector<std::byte> target = over(now, header);
  now.resize(target.size());
  if (!write_sectors(now, target)) {
    const uint64_t name_at = move_name_away(now);
    target = over(now, serialise_header(wanted, name_at));
    if (now.size() != target.size() || !write_sectors(now, target)) {
      Header between = header_;
      between.autoclear &= ~kAutoclearBitmaps;
      write_numbers(between);
      write(0, target);
    }
  }
  header_ = std::move(wanted);
}

// False: there is no order that is sound at every step; nothing was written.
bool HeaderUpdate::write_sectors(std::vector<std::byte>& now,
                                 const std::vector<std::byte>& wanted) {
  const auto order = sound_sector_order(now, wanted, file_.size());
  if (!order) return false;
  for (const size_t sector : *order) {
    const size_t begin = sector * kHeaderSector;
    const size_t length = std::min(kHeaderSector, wanted.size() - begin);
    write(begin, std::span(wanted).subspan(begin, length));
  }
  now = wanted;
  return true;
}

// The backing file's name goes to the end of the cluster, where nothing has to pass over it.
// Returns where it is then, or 0: it is where it was, or there is none.
uint64_t HeaderUpdate::move_name_away(std::vector<std::byte>& now) {
  constexpr uint64_t kRoom = 1024;  // more than the longest name
  const auto offset = base::load_be<uint64_t>(now.data() + 8);
  const auto length = base::load_be<uint32_t>(now.data() + 16);
  const uint64_t name_at = (uint64_t{1} << header_.cluster_bits) - kRoom;
  if (offset == 0 || header_.cluster_bits < 12 || now.size() < name_at + kRoom) return 0;
  if (offset + length > name_at) return offset == name_at ? name_at : 0;
  const auto name = now.begin() + static_cast<std::ptrdiff_t>(offset);
  std::copy(name, name + length, now.begin() + static_cast<std::ptrdiff_t>(name_at));
  write(name_at, std::span(now).subspan(name_at, length));
  base::store_be(now.data() + 8, name_at);
  write(0, std::span(now).first(kHeaderSector));
  return name_at;
}

void HeaderUpdate::write(uint64_t offset, std::span<const std::byte> bytes) {
  file_.write(offset, base::SingleBuffer(bytes));
  file_.flush();
}

}  // namespace minivmm::block::qcow2
