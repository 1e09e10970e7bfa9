// SPDX-License-Identifier: Apache-2.0
#include "bootdisk/channel.h"

#include <unistd.h>

#include <cerrno>

#include "base/error.h"

namespace minivmm::bootdisk {

using base::Error;

namespace {

// True: go on, with what is left if anything was done. Throws for the rest.
bool went_on(ssize_t result) {
  if (result > 0) return true;
  if (result == 0) throw Error(EPIPE, "the other process has ended");
  if (errno == EINTR) return true;
  if (errno == EAGAIN) throw Error(ETIMEDOUT, "the other process takes too long");
  throw base::errno_error(errno, "the other process");
}

}  // namespace

void Channel::send(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (went_on(n) && n > 0) bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void Channel::receive(std::span<std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::read(fd_, bytes.data(), bytes.size());
    if (went_on(n) && n > 0) bytes = bytes.subspan(static_cast<size_t>(n));
  }
}

void Channel::send_text(Kind kind, std::string_view text) {
  text = text.substr(0, kMaxText);
  send_value(Message{kind, static_cast<uint32_t>(text.size()), 0});
  send(std::as_bytes(std::span(text)));
}

}  // namespace minivmm::bootdisk
