// SPDX-License-Identifier: Apache-2.0
// Raw mode of a terminal for as long as the object lives. The old settings come back in the
// destructor, at exit(), and from a handler for the signals a crash raises. One at a time in a
// process.
#pragma once

namespace minivmm::vmm {

// Gives a terminal that is raw back now; no effect where none is. Any thread, and before _exit().
void restore_terminal() noexcept;

class RawTerminal {
 public:
  // Does nothing where `fd` is not a terminal, or is one that another job has in the foreground.
  // Throws base::Error(EBUSY) for a second one.
  explicit RawTerminal(int fd);
  ~RawTerminal();
  RawTerminal(const RawTerminal&) = delete;
  RawTerminal& operator=(const RawTerminal&) = delete;

  bool active() const noexcept { return active_; }

 private:
  bool active_ = false;
};

}  // namespace minivmm::vmm
