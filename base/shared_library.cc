// SPDX-License-Identifier: Apache-2.0
#include "base/shared_library.h"

#include <cerrno>

#include <dlfcn.h>
#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::base {

SharedLibrary::SharedLibrary(const char* file, std::string needs, const char* package)
    : file_(file), needs_(std::move(needs)), handle_(::dlopen(file, RTLD_NOW | RTLD_LOCAL)) {
  if (handle_ == nullptr) {
    throw Error(ENOTSUP,
                fmt::format("{}: install the package {} ({})", needs_, package, ::dlerror()));
  }
}

void* SharedLibrary::address_if_there(const char* name) const noexcept {
  return ::dlsym(handle_, name);
}

void* SharedLibrary::address_of(const char* name) const {
  void* const out = address_if_there(name);
  if (out == nullptr) {
    throw Error(ENOTSUP, fmt::format("{} has no function {}: {}", file_, name, needs_));
  }
  return out;
}

}  // namespace minivmm::base
