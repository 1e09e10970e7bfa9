// SPDX-License-Identifier: Apache-2.0
#include "cli/image_named_file.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/driver.h"

namespace minivmm::cli {

using base::Error;
using block::Options;

namespace {

bool is_protocol(const std::string& name) {
  const auto all = block::drivers();
  return std::any_of(all.begin(), all.end(), [&](const block::Driver& driver) {
    return driver.name == name && driver.kind == block::DriverKind::kProtocol;
  });
}

// The options of the file alone, taken out of those of the image.
Options take_file(Options& image, const std::string& text) {
  if (auto filename = image.take_string("filename")) return file_options(host_path(*filename));
  auto child = image.take_child("file");
  if (!child || !child->options) {
    throw Error(EINVAL,
                fmt::format("'{}': says nothing of the image's file (file.filename=PATH)", text));
  }
  Options file = std::move(*child->options);
  if (!file.has("driver")) {
    if (auto filename = file.take_string("filename")) {
      set_protocol(file, "", host_path(*filename));
    } else {
      file.set("driver", "file");
    }
  }
  return file;
}

}  // namespace

NamedFile named_file(const ImageName& name) {
  NamedFile out;
  out.format = name.format;
  if (!name.is_options) {
    out.path = host_path(name.text);
    out.file = file_options(out.path);
    return out;
  }
  out.image = Options::from_text(name.text);
  if (is_protocol(out.image.peek("driver").value_or(""))) {
    out.format = "raw";
    out.file = std::exchange(out.image, {});
  } else {
    if (const auto driver = out.image.take_string("driver")) out.format = *driver;
    out.file = take_file(out.image, name.text);
  }
  for (const char* key : {"filename", "uri"}) {
    if (const auto path = out.file.peek(key)) out.path = *path;
  }
  if (out.path.empty()) out.path = name.text;
  const auto keys = out.file.keys();
  out.is_path = std::all_of(keys.begin(), keys.end(), [](const std::string& key) {
    return key == "driver" || key == "filename" || key == "uri";
  });
  return out;
}

NamedFile named_path(const ImageName& name) {
  NamedFile out = named_file(name);
  if (out.is_path && !out.image.has("backing")) return out;
  throw Error(ENOTSUP, fmt::format("'{}': of the file only its name can be given here: the chain "
                                   "is found by file names",
                                   name.text));
}

}  // namespace minivmm::cli
