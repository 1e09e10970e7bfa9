// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/child.h"

#include <string>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <span>

#include <fmt/format.h>

#include "base/error.h"
#include "bootdisk/channel.h"
#include "bootdisk/finder.h"
#include "bootdisk/remote_source.h"

namespace minivmm::bootdisk {

using base::Error;

namespace {

void write_all(int fd, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw base::errno_error(errno, "keeping what was found");
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void search(Channel& channel, const Terms& terms) {
  RemoteSource disk(channel, terms.disk_size);
  Finder finder(disk);
  for (const std::string& note : finder.notes()) channel.send_text(Kind::kNote, note);
  const auto found = finder.find();
  if (!found && !finder.foreign().empty()) {
    throw Error(
        EOPNOTSUPP,
        fmt::format("only ext2, ext3 and ext4 can be read, and there is none with a kernel, but "
                    "{}",
                    fmt::join(finder.foreign(), ", ")));
  }
  if (!found) {
    channel.send_text(Kind::kNothing, {});
    return;
  }
  finder.copy(found->entry.kernel, terms.limit,
              [](std::span<const std::byte> bytes) { write_all(kKernelFd, bytes); });
  uint64_t room = terms.limit;
  for (const std::string& initrd : found->entry.initrds) {
    finder.copy(initrd, room, [&](std::span<const std::byte> bytes) {
      write_all(kInitrdFd, bytes);
      room -= bytes.size();
    });
  }
  std::string answer;
  for (const std::string& part : {found->origin, found->entry.title, found->entry.arguments,
                                  std::string(found->entry.initrds.empty() ? "" : "initrd")}) {
    answer.append(part.c_str());  // up to a NUL, which is the separator
    answer += '\0';
  }
  channel.send_text(Kind::kFound, answer);
}

}  // namespace

int run_child(void (*prepare)(uint64_t limit)) {
  Channel channel(kChannelFd);
  try {
    const auto terms = channel.receive_value<Terms>();
    prepare(terms.limit);
    search(channel, terms);
    return 0;
  } catch (const std::exception& e) {
    try {
      channel.send_text(Kind::kFailed, e.what());
    } catch (const Error&) {
      // Nobody listens any more.
    }
    return 1;
  }
}

}  // namespace minivmm::bootdisk
