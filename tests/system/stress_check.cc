// SPDX-License-Identifier: Apache-2.0
#include "tests/system/stress_check.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "base/unique_fd.h"

namespace minivmm::test {
namespace {

using probe::SectorKind;
using probe::StressOp;

constexpr size_t kMaxProblems = 10;

bool changes(StressOp op) { return op != StressOp::kRead && op != StressOp::kFlush; }

// What the requests may have done to one block.
struct BlockHistory {
  uint64_t required = 0;           // last durable change, 0 = none
  std::vector<uint64_t> possible;  // later ones
};

std::vector<BlockHistory> replay(const StressCheck& check) {
  std::vector<BlockHistory> blocks(check.parameters.blocks);
  for (uint64_t sequence = check.first; sequence <= check.issued; ++sequence) {
    const auto request = probe::stress_request(check.parameters, sequence);
    if (!changes(request.op)) continue;
    for (uint32_t i = 0; i < request.count; ++i) {
      BlockHistory& block = blocks[request.block + i];
      if (sequence <= check.durable) {
        block.required = sequence;
      } else {
        block.possible.push_back(sequence);
      }
    }
  }
  return blocks;
}

class Checker {
 public:
  explicit Checker(const StressCheck& check) : check_(check), blocks_(replay(check)) {}

  std::vector<std::string> run(const ReadDisk& read) {
    const size_t size = check_.parameters.block_size;
    std::vector<uint64_t> words(size / 8);
    for (uint64_t n = 0; n < blocks_.size() && problems_.size() < kMaxProblems; ++n) {
      const uint64_t offset = check_.parameters.offset + n * size;
      read(offset, std::as_writable_bytes(std::span(words)));
      check_block(n, offset, words);
    }
    return std::move(problems_);
  }

 private:
  // The sequence a sector shows: of its stamp, 0 for zeroes, or nothing sensible.
  struct Found {
    SectorKind kind;
    uint64_t sequence;
  };

  void check_block(uint64_t n, uint64_t offset, const std::vector<uint64_t>& words) {
    const BlockHistory& history = blocks_[n];
    if (history.required == 0 && !check_.started_empty) return;
    Found first{};
    for (size_t at = 0; at < words.size(); at += probe::kStampWords) {
      probe::Stamp stamp;
      const uint64_t sector = offset + at * 8;
      const Found found{probe::read_stamp(&words[at], sector, &stamp), stamp.sequence};
      if (!allowed(history, found, stamp)) {
        report(sector, history, found);
        return;
      }
      if (at == 0) first = found;
      if (!check_.may_tear && (found.kind != first.kind || found.sequence != first.sequence)) {
        problems_.push_back("block at " + std::to_string(offset) + " is torn");
        return;
      }
    }
  }

  bool allowed(const BlockHistory& history, const Found& found, const probe::Stamp& stamp) const {
    if (found.kind == SectorKind::kStamp) {
      if (stamp.writer != check_.writer) return false;
      if (stamp.seed != static_cast<uint32_t>(check_.parameters.seed)) return false;
    } else if (found.kind != SectorKind::kZero) {
      return false;
    }
    const auto explains = [&](uint64_t sequence) {
      if (sequence == 0) return found.kind == SectorKind::kZero;  // as it was at the start
      const StressOp op = probe::stress_request(check_.parameters, sequence).op;
      if (op == StressOp::kWrite)
        return found.kind == SectorKind::kStamp && stamp.sequence == sequence;
      if (op == StressOp::kZero) return found.kind == SectorKind::kZero;
      // After a discard: zeroes, or anything that was there before.
      return found.kind == SectorKind::kZero || stamp.sequence < sequence;
    };
    return explains(history.required) ||
           std::any_of(history.possible.begin(), history.possible.end(), explains);
  }

  void report(uint64_t sector, const BlockHistory& history, const Found& found) {
    std::ostringstream text;
    text << "sector at " << sector << ": ";
    switch (found.kind) {
      case SectorKind::kStamp:
        text << "stamp of request " << found.sequence;
        break;
      case SectorKind::kZero:
        text << "zeroes";
        break;
      case SectorKind::kForeign:
        text << "foreign data";
        break;
      case SectorKind::kDamaged:
        text << "a damaged stamp";
        break;
    }
    text << ", wanted request " << history.required << " or one of " << history.possible.size()
         << " later ones";
    problems_.push_back(text.str());
  }

  const StressCheck& check_;
  const std::vector<BlockHistory> blocks_;
  std::vector<std::string> problems_;
};

}  // namespace

std::vector<std::string> check_stress(const StressCheck& check, const ReadDisk& read) {
  return Checker(check).run(read);
}

ReadDisk read_file(const std::string& path) {
  auto fd = std::make_shared<base::UniqueFd>(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!*fd) throw std::runtime_error("cannot open " + path);
  return [fd, path](uint64_t offset, std::span<std::byte> out) {
    const ssize_t n = ::pread(fd->get(), out.data(), out.size(), static_cast<off_t>(offset));
    if (n != static_cast<ssize_t>(out.size())) throw std::runtime_error("short read of " + path);
  };
}

}  // namespace minivmm::test
