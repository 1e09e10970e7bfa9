// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <cerrno>
#include <new>
#include <utility>

namespace minivmm::base {

Error::Error(int err, std::string message)
    : err_(err == 0 ? EIO : err), text_(std::move(message)) {}

Error& Error::prepend(std::string_view where) {
  text_.insert(0, std::string(where) + ": ");
  return *this;
}

std::string errno_text(int err) { return std::generic_category().message(err); }

Error errno_error(int err, std::string_view what) {
  return Error(err, std::string(what) + ": " + errno_text(err));
}

int errno_of(const std::exception_ptr& error) noexcept {
  try {
    std::rethrow_exception(error);
  } catch (const Error& e) {
    return e.err();
  } catch (const std::bad_alloc&) {
    return ENOMEM;
  } catch (...) {
    return EIO;
  }
}

std::string text_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& e) {
    return e.what();
  } catch (...) {
    return "unknown error";
  }
}

}  // namespace minivmm::base
