// SPDX-License-Identifier: Apache-2.0
#include "control/disk_kernel.h"

#include <string_view>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/log.h"
#include "bootdisk/channel.h"
#include "bootdisk/foreign.h"
#include "control/finder_process.h"

namespace minivmm::control {

using base::Error;
using bootdisk::Kind;
using bootdisk::Message;

namespace {

constexpr size_t kMaxNotes = 64;

class HandleSource final : public bootdisk::ByteSource {
 public:
  explicit HandleSource(block::Handle& handle) : handle_(handle) {}
  uint64_t size() const noexcept override { return handle_.size(); }
  void read(uint64_t offset, std::span<std::byte> out) override {
    handle_.read(offset, base::SingleBuffer(out.data(), out.size()));
  }

 private:
  block::Handle& handle_;
};

// A partition table or a file system at its beginning. Without one there is nothing to start a
// process for.
bool worth_a_search(block::Handle& disk) {
  std::vector<std::byte> head(4608);
  const size_t length = std::min<uint64_t>(disk.size(), head.size());
  try {
    disk.read(0, base::SingleBuffer(head.data(), length));
  } catch (Error& e) {
    e.prepend(fmt::format("{}: reading its first blocks", disk.describe()));
    throw;
  }
  const auto has = [&](size_t at, std::string_view text) {
    return std::memcmp(head.data() + at, text.data(), text.size()) == 0;
  };
  constexpr std::string_view kGpt = "EFI PART";
  if (has(510, "\x55\xaa") || has(1080, "\x53\xef") || has(512, kGpt) || has(4096, kGpt))
    return true;
  HandleSource source(disk);
  return !bootdisk::foreign_content(source, {0, 0, disk.size(), {}}).empty();
}

void let_go(block::Handle& handle) noexcept {
  try {
    handle.close();
  } catch (const std::exception&) {
    // Nothing was written, so nothing is lost.
  }
}

// The disk as the search sees it: attached like a guest that only reads.
class DiskReader {
 public:
  DiskReader(base::EventLoop& loop, block::Handle handle)
      : loop_(loop), handle_(std::move(handle)) {}
  ~DiskReader() {
    loop_.call("detach from search", [this] { let_go(handle_); });
  }
  DiskReader(const DiskReader&) = delete;
  DiskReader& operator=(const DiskReader&) = delete;

  uint64_t size() const noexcept { return handle_.size(); }
  std::string describe() const { return handle_.describe(); }

  // errno.
  int read(uint64_t offset, std::span<std::byte> out) noexcept {
    if (offset > size() || out.size() > size() - offset) return EINVAL;
    return loop_.call("search for a kernel", [&]() -> int {
      try {
        handle_.read(offset, base::SingleBuffer(out.data(), out.size()));
        return 0;
      } catch (const Error& e) {
        return e.err();
      } catch (const std::exception&) {
        return ENOMEM;
      }
    });
  }

 private:
  base::EventLoop& loop_;
  block::Handle handle_;
};

class Search {
 public:
  Search(DiskReader& disk, uint64_t limit) : disk_(disk), channel_(process_.channel()) {
    channel_.send_value(bootdisk::Terms{disk.size(), limit});
  }

  std::optional<DiskKernel> run() {
    for (;;) {
      const auto message = channel_.receive_value<Message>();
      switch (message.kind) {
        case Kind::kRead:
          answer_read(message);
          break;
        case Kind::kNote:
          if (result_.notes.size() == kMaxNotes) throw confused();
          result_.notes.push_back(text(message));
          break;
        case Kind::kFound:
          return found(text(message));
        case Kind::kNothing:
          return nothing();
        case Kind::kFailed:
          throw Error(EIO, text(message));
        default:
          throw confused();
      }
    }
  }
  std::string how_it_ended() { return process_.end(); }

 private:
  static Error confused() { return Error(EPROTO, "it answered what makes no sense"); }

  void answer_read(const Message& message) {
    if (message.length > bootdisk::kMaxRead) throw confused();
    buffer_.resize(message.length);
    const int32_t err = disk_.read(message.offset, buffer_);
    channel_.send_value(err);
    if (err == 0) channel_.send(buffer_);
  }

  std::string text(const Message& message) {
    if (message.length > bootdisk::kMaxText) throw confused();
    std::string out(message.length, '\0');
    channel_.receive(std::as_writable_bytes(std::span(out)));
    // It is the guest's own text and may end on a terminal. NUL parts the answer's fields.
    std::replace_if(
        out.begin(), out.end(),
        [](char c) { return c != '\0' && (static_cast<unsigned char>(c) < ' ' || c == '\x7f'); },
        '?');
    return out;
  }

  std::optional<DiskKernel> nothing() const {
    for (const std::string& note : result_.notes) {
      base::log_warning("{}: {}", disk_.describe(), note);
    }
    base::log_info("{}: no kernel was found in its /boot, so the probe guest runs",
                   disk_.describe());
    return std::nullopt;
  }

  DiskKernel found(std::string_view answer) {
    const auto take = [&] {
      const size_t end = answer.find('\0');
      if (end == std::string_view::npos) throw confused();
      std::string out(answer.substr(0, end));
      answer.remove_prefix(end + 1);
      return out;
    };
    result_.origin = take();
    result_.title = take();
    result_.arguments = take();
    if (!take().empty()) result_.initrd = std::move(process_.initrd());
    result_.kernel = std::move(process_.kernel());
    return std::move(result_);
  }

  DiskReader& disk_;
  FinderProcess process_;
  bootdisk::Channel channel_;
  DiskKernel result_;
  std::vector<std::byte> buffer_;
};

}  // namespace

std::optional<DiskKernel> find_disk_kernel(base::EventLoop& loop, block::Graph& graph,
                                           const std::string& node_name, uint64_t limit) {
  // In one go: most disks end here, and a hand-over to the loop and back is long at a start.
  auto handle = loop.call("look at the disk", [&]() -> std::optional<block::Handle> {
    block::Handle out =
        graph.attach(node_name, fmt::format("search for a kernel on '{}'", node_name),
                     block::Permissions::front_end(false));
    try {
      if (worth_a_search(out)) return out;
    } catch (...) {
      let_go(out);
      throw;
    }
    let_go(out);
    return std::nullopt;
  });
  if (!handle) return std::nullopt;
  DiskReader disk(loop, std::move(*handle));
  Search search(disk, limit);
  const auto failed = [&](const std::string& why) {
    return Error(EIO, fmt::format("{}: the search for a kernel in its /boot: {}; give one with "
                                  "--kernel, or --probe for the built-in guest",
                                  disk.describe(), why));
  };
  try {
    return search.run();
  } catch (const Error& e) {
    throw failed(e.err() == EPIPE ? search.how_it_ended() : e.what());
  }
}

}  // namespace minivmm::control
