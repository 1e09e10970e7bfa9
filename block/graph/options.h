// SPDX-License-Identifier: Apache-2.0
// A node's description: an ordered tree of options with QEMU's names, made from JSON or from dotted
// keys ("driver=qcow2,file.driver=file,file.filename=a.qcow2"). Values are kept as text and are
// converted where they are used, so both forms mean the same.
//
// Drivers take what they know; finish() then reports what nobody took. A plain value type.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace minivmm::block {

class Options {
 public:
  Options();
  Options(const Options&);
  Options(Options&&) noexcept;
  Options& operator=(const Options&);
  Options& operator=(Options&&) noexcept;
  ~Options();

  // "key=value,key.sub=value"; a doubled comma is a comma of the value; a bare "key" is key=on.
  // Throws EINVAL.
  static Options from_keys(std::string_view text);
  // A JSON object; numbers and booleans become text, null becomes an explicit null, nested objects
  // subtrees. Throws EINVAL with the position.
  static Options from_json(std::string_view text);
  // JSON where the text begins with '{', keys otherwise.
  static Options from_text(std::string_view text);

  // Sets a scalar by dotted key. Throws EINVAL where the key, or a part of it, is set already.
  void set(std::string_view dotted_key, std::string value);
  void set_null(std::string_view dotted_key);
  void set_child(std::string_view dotted_key, Options child);
  bool empty() const noexcept { return items_.empty(); }
  // `key` as it stands at this level, without dots.
  bool has(std::string_view key) const;
  // The scalar under a key of this level, without taking it.
  std::optional<std::string> peek(std::string_view key) const;
  std::vector<std::string> keys() const;

  // Each take_ removes the key ("size", or dotted: "cache.direct"). A wrong value throws EINVAL
  // naming the key, the value and what is expected.
  std::optional<std::string> take_string(std::string_view key);
  std::string require_string(std::string_view key);         // EINVAL if missing
  bool take_bool(std::string_view key, bool otherwise);     // on/off/yes/no/true/false
  std::optional<uint64_t> take_size(std::string_view key);  // 64K, 1.5G, 1048576
  uint64_t take_uint(std::string_view key, uint64_t otherwise, uint64_t min, uint64_t max);
  // One of `choices`; returns its index.
  size_t take_choice(std::string_view key, const std::vector<std::string_view>& choices,
                     size_t otherwise);
  // True if the key was present as an explicit null (JSON null; an empty value in keys): "no such
  // child". Leaves anything else in place.
  bool take_null(std::string_view key);

  // A child: a subtree, or a reference by node-name. Nullopt: not given.
  struct Child {
    std::string reference;             // empty: `options` describe it inline
    std::unique_ptr<Options> options;  // null for a reference
  };
  std::optional<Child> take_child(std::string_view key);

  // Throws EINVAL if anything is left: "<what>: unknown option 'x'".
  void finish(std::string_view what) const;

  // Compact JSON of what is there now; every scalar is a string.
  std::string to_json() const;

 private:
  struct Item;
  Item* find(std::string_view key);
  const Item* find(std::string_view key) const;
  std::optional<Item> take(std::string_view key);
  // Makes the item at the end of a dotted path; throws if it exists.
  Item& make(std::string_view dotted_key);
  std::vector<Item> items_;
};

// "64K", "1.5G", "0x1000", "123": bytes, by powers of 1024 as qemu-img reads them. Throws EINVAL
// naming `what`.
uint64_t parse_size(std::string_view text, std::string_view what);

}  // namespace minivmm::block
