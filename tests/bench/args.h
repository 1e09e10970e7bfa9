// SPDX-License-Identifier: Apache-2.0
// "--name=value" and "--flag" arguments of the measuring tools; positional ones are kept in order.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <vector>

namespace minivmm::bench {

class Args {
 public:
  // Throws base::Error (EINVAL) for an option that is not in `known`.
  Args(int argc, char** argv, std::initializer_list<std::string_view> known);

  bool has(const std::string& name) const { return options_.contains(name); }
  std::string text(const std::string& name, const std::string& otherwise) const;
  // Accepts the suffixes k, M and G (1024-based); throws base::Error (EINVAL) on anything else.
  std::uint64_t number(const std::string& name, std::uint64_t otherwise) const;
  double real(const std::string& name, double otherwise) const;
  const std::vector<std::string>& positional() const { return positional_; }

 private:
  std::map<std::string, std::string> options_;
  std::vector<std::string> positional_;
};

}  // namespace minivmm::bench
