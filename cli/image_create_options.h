// SPDX-License-Identifier: Apache-2.0
// The -o options of `image create` and `image amend`: which there are for a format, what qemu-img
// calls wrong about a value, and the line that qemu-img prints of them. A plain value.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "block/graph/options.h"

namespace minivmm::cli {

struct CreateOption {
  enum class Kind { kText, kSize, kNumber, kBool };
  std::string_view name;
  Kind kind;
  std::string_view initial;  // printed where it is not given; empty: then not printed
  std::string_view help;
  bool of_file = false;  // it is not the format's but the file's
};

class CreateOptionList {
 public:
  // Throws EINVAL for a format that cannot be created.
  explicit CreateOptionList(std::string_view format);

  // Those of `image amend`. Throws ENOTSUP for a format that has none.
  static CreateOptionList for_amend(std::string_view format);

  // True if the text of an -o asks for the list of options ("help" or "?" in it).
  static bool asks_for_help(std::string_view text);
  // "Supported qcow2 options:" and the rest; with those of a file of this host where one is named.
  std::string help(bool of_a_file = false) const;

  // "name=value,name=value", a comma in a value doubled, "name" alone for name=on; what is given
  // again replaces what was there. Throws EINVAL in qemu-img's words.
  void parse(std::string_view text);
  // Throws EINVAL where the format has no such option.
  void set(std::string_view name, std::string value);
  bool has(std::string_view name) const { return find(name) != nullptr; }
  // The text that was given; empty if none was.
  std::string get(std::string_view name) const;
  // Of an option that is a size; nothing if it was not given.
  std::optional<uint64_t> bytes(std::string_view name) const;
  std::optional<uint64_t> size() const { return bytes("size"); }
  bool is_on(std::string_view name) const;
  bool encrypted() const;  // a qcow2 image

  // "cluster_size=65536 size=1048576 ..." in qemu-img's order.
  std::string formatted() const;
  // What was given and matters to the driver; what is only of the file is made with it.
  block::Options for_driver() const;

 private:
  struct Value {
    const CreateOption* option;
    std::string text;
  };
  const CreateOption& option(std::string_view name) const;
  const Value* find(std::string_view name) const;

  // Of `image amend`.
  CreateOptionList(std::string_view format, std::span<const CreateOption> options)
      : format_(format), options_(options), amends_(true) {}

  std::string_view format_;
  std::span<const CreateOption> options_;
  bool amends_ = false;
  std::vector<Value> values_;
};

}  // namespace minivmm::cli
