// SPDX-License-Identifier: Apache-2.0
// The filters of system calls (call_filter.h) of the threads that do I/O: event loops, pools, and
// what they start. A daemon opens everything first, and then confines them: from then on they work
// with what is open. What still has to be opened or changed later (an NBD server that is connected
// to again, unmounting, removing a socket's file) is an errand: Pool::errands().
#pragma once

#include <string>

namespace minivmm::base {

enum class IoThread {
  kLoop,   // files, sockets, rings that are open; makes threads, which inherit its filter
  kPool,   // the same
  kWork,   // computes, and speaks through sockets that are open
  kPages,  // tells the kernel of pages, through one descriptor
};

// From now on, for the whole process: confine_io_thread() works, threads of pools call it before
// their next task, and the threads that run errands exist. Any thread that has no filter, once.
void confine_io_threads();

bool io_threads_are_confined() noexcept;

// Filters the calling thread, on top of what it inherited; without effect before
// confine_io_threads().
void confine_io_thread(IoThread kind, const std::string& name) noexcept;

// Whether this thread did that, so that the threads that it makes have its filter.
bool this_io_thread_is_confined() noexcept;

}  // namespace minivmm::base
