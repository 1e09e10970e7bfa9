// SPDX-License-Identifier: Apache-2.0
// As much of std::string_view as the probe needs. The library's own header speaks of floating
// point, which clang refuses for code that may use general registers only.
#pragma once

#include <cstddef>

namespace minivmm::probe {

class StringView {
 public:
  static constexpr size_t npos = ~size_t{0};

  constexpr StringView() = default;
  constexpr StringView(const char* data, size_t size) : data_(data), size_(size) {}
  constexpr StringView(const char* text) : data_(text), size_(__builtin_strlen(text)) {}

  constexpr const char* data() const { return data_; }
  constexpr size_t size() const { return size_; }
  constexpr bool empty() const { return size_ == 0; }
  constexpr char operator[](size_t i) const { return data_[i]; }
  constexpr char front() const { return data_[0]; }
  constexpr const char* begin() const { return data_; }
  constexpr const char* end() const { return data_ + size_; }

  constexpr void remove_prefix(size_t n) {
    data_ += n;
    size_ -= n;
  }
  constexpr size_t find(char c) const {
    for (size_t i = 0; i < size_; ++i) {
      if (data_[i] == c) return i;
    }
    return npos;
  }
  constexpr bool starts_with(StringView prefix) const {
    if (prefix.size_ > size_) return false;
    for (size_t i = 0; i < prefix.size_; ++i) {
      if (data_[i] != prefix.data_[i]) return false;
    }
    return true;
  }
  friend constexpr bool operator==(StringView a, StringView b) {
    return a.size_ == b.size_ && a.starts_with(b);
  }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace minivmm::probe
