// SPDX-License-Identifier: Apache-2.0
// The one exception type of the program: an errno and a text that a user can act on.
//
// A message says what, where and what to do. Lower layers state the cause; each layer on the way
// up may prepend where it was ("overlay.qcow2", "L2 table at 0x50000"). Front ends translate an
// Error once, at their edge: virtio status, NBD error, FUSE errno, CLI text.
#pragma once

#include <string>
#include <string_view>

#include <exception>
#include <system_error>

namespace minivmm::base {

class Error : public std::exception {
 public:
  // `err` is a positive errno value; 0 is treated as EIO.
  Error(int err, std::string message);

  // "context: context: message"
  const char* what() const noexcept override { return text_.c_str(); }
  int err() const noexcept { return err_; }
  std::error_code code() const noexcept { return {err_, std::generic_category()}; }

  // Prepends "where: ". For use as: catch (Error& e) { e.prepend(name()); throw; }
  Error& prepend(std::string_view where);

 private:
  int err_;
  std::string text_;
};

// An Error that ends with the system's text for `err`: "overlay.qcow2: cannot open: Permission
// denied".
Error errno_error(int err, std::string_view what);

// errno of any exception: of an Error its own, std::bad_alloc ENOMEM, everything else EIO.
// Call inside a catch block's exception pointer.
int errno_of(const std::exception_ptr& error) noexcept;
std::string text_of(const std::exception_ptr& error);

// The system's text for an errno value, thread-safe.
std::string errno_text(int err);

}  // namespace minivmm::base
