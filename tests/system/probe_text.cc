// SPDX-License-Identifier: Apache-2.0
#include "tests/system/probe_text.h"

#include <cstdlib>
#include <sstream>

namespace minivmm::test {

std::string ProbeLine::value(const std::string& key) const {
  const size_t at = text.find(" " + key + "=");
  if (at == std::string::npos) return {};
  size_t begin = at + key.size() + 2;
  const char end_mark = begin < text.size() && text[begin] == '"' ? '"' : ' ';
  if (end_mark == '"') ++begin;
  const size_t end = text.find(end_mark, begin);
  return text.substr(begin, end == std::string::npos ? end : end - begin);
}

uint64_t ProbeLine::number(const std::string& key) const {
  return std::strtoull(value(key).c_str(), nullptr, 10);
}

std::vector<ProbeLine> results(const std::string& output, const std::string& job) {
  std::vector<ProbeLine> out;
  std::istringstream lines(output);
  for (std::string line; std::getline(lines, line);) {
    const std::string good = "probe: " + job + " ok";
    const std::string bad = "probe: " + job + " FAILED";
    if (line.rfind(good, 0) == 0) out.push_back({line, true});
    if (line.rfind(bad, 0) == 0) out.push_back({line, false});
  }
  return out;
}

}  // namespace minivmm::test
