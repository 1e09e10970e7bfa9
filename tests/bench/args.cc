// SPDX-License-Identifier: Apache-2.0
#include "args.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "base/error.h"

namespace minivmm::bench {
namespace {

unsigned suffix_shift(const char* suffix) {
  const std::string_view s(suffix);
  if (s.empty()) return 0;
  if (s == "k" || s == "K") return 10;
  if (s == "m" || s == "M") return 20;
  if (s == "g" || s == "G") return 30;
  return 64;
}

}  // namespace

Args::Args(int argc, char** argv, std::initializer_list<std::string_view> known) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view arg(argv[i]);
    if (!arg.starts_with("--")) {
      positional_.emplace_back(arg);
      continue;
    }
    const std::size_t equals = arg.find('=');
    const std::string name(arg.substr(2, equals == arg.npos ? arg.npos : equals - 2));
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      throw base::Error(EINVAL, "unknown option --" + name);
    }
    options_[name] = equals == arg.npos ? "1" : std::string(arg.substr(equals + 1));
  }
}

std::string Args::text(const std::string& name, const std::string& otherwise) const {
  const auto it = options_.find(name);
  return it == options_.end() ? otherwise : it->second;
}

std::uint64_t Args::number(const std::string& name, std::uint64_t otherwise) const {
  const auto it = options_.find(name);
  if (it == options_.end()) return otherwise;
  char* end = nullptr;
  errno = 0;
  const std::uint64_t value = std::strtoull(it->second.c_str(), &end, 10);
  const unsigned shift = suffix_shift(end);
  if (errno != 0 || end == it->second.c_str() || shift > 30 || value > (UINT64_MAX >> shift)) {
    throw base::Error(EINVAL, "--" + name + "=" + it->second + " is not a number");
  }
  return value << shift;
}

double Args::real(const std::string& name, double otherwise) const {
  const auto it = options_.find(name);
  if (it == options_.end()) return otherwise;
  char* end = nullptr;
  const double value = std::strtod(it->second.c_str(), &end);
  if (end == it->second.c_str() || *end != '\0' || !(value >= 0)) {
    throw base::Error(EINVAL, "--" + name + "=" + it->second + " is not a number");
  }
  return value;
}

}  // namespace minivmm::bench
