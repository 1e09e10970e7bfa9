// SPDX-License-Identifier: Apache-2.0
// Opening: the header, what it may ask for, the backing file.
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/repair.h"
#include "block/formats/qcow2/snapshots/snapshot_view.h"
#include "block/graph/open_policy.h"
#include "block/graph/opening.h"

namespace minivmm::block {
namespace {

using base::Error;
using qcow2::Header;

std::string name_of(const NodeConfig& config, const Node& file) {
  return file.filename().empty() ? fmt::format("'{}'", config.node_name) : file.filename();
}

Header read_supported_header(const NodeConfig& config, const std::shared_ptr<Node>& file) {
  const std::string name = name_of(config, *file);
  try {
    Edge edge(file, fmt::format("opening qcow2 node '{}'", config.node_name),
              {.uses = 0, .shares = Permissions::kWrite | Permissions::kResize});
    Header header = qcow2::read_header(edge);
    qcow2::require_supported(header);
    return header;
  } catch (Error& e) {
    e.prepend(name);
    throw;
  }
}

// Refcounts of a dirty image may be wrong, and anything of a corrupt one: new clusters could be
// ones that are in use.
[[noreturn]] void refuse_writing(const std::string& name, const char* state) {
  throw Error(EROFS, fmt::format("{}: the image {} and cannot be written to: repair it with "
                                 "`minivmm image check -r all`, or open it with read-only=on",
                                 name, state));
}

// An image that was not closed: its refcounts are counted anew. Where there is more damage than can
// be mended it is not written to.
void count_anew(const NodeConfig& config, const std::shared_ptr<Node>& file,
                const std::string& name) {
  base::log_info("{}: the image was not closed properly: its refcounts are set right", name);
  Edge edge(file, fmt::format("repairing qcow2 node '{}'", config.node_name),
            Permissions::format_file(true));
  const qcow2::RepairResult result =
      qcow2::repair_image(edge, qcow2::Repair::kAll,
                          [&](const std::string& line) { base::log_debug("{}: {}", name, line); });
  if (result.left.corruptions + result.left.check_errors != 0) {
    refuse_writing(name, "was not closed properly, has damage that could not be mended");
  }
}

// The header of an image that can be written, if it is to be.
Header make_clean(const NodeConfig& config, const std::shared_ptr<Node>& file, Header header,
                  const std::string& name) {
  if (config.read_only) return header;
  if ((header.incompatible & qcow2::kIncompatCorrupt) != 0) {
    refuse_writing(name, "is marked as corrupt");
  }
  if ((header.incompatible & qcow2::kIncompatDirty) == 0) return header;
  count_anew(config, file, name);
  return read_supported_header(config, file);
}

// The header, or that of the snapshot which is asked for instead of the disk.
Header choose_snapshot(const NodeConfig& config, const std::shared_ptr<Node>& file,
                       Options& options, Header header) {
  const qcow2::SnapshotName name{.either = options.take_string("snapshot"),
                                 .id = options.take_string("snapshot-id"),
                                 .name = options.take_string("snapshot-name")};
  if (!name.either && !name.id && !name.name) return header;
  try {
    if (!config.read_only) throw Error(EROFS, "a snapshot can only be read: give read-only=on");
    Edge edge(file, fmt::format("opening a snapshot of '{}'", config.node_name),
              {.uses = 0, .shares = Permissions::kWrite | Permissions::kResize});
    return qcow2::header_of_snapshot(edge, header, name);
  } catch (Error& e) {
    e.prepend(name_of(config, *file));
    throw;
  }
}

std::shared_ptr<Node> open_backing(Opening& opening, const NodeConfig& config, Options& options,
                                   const Header& header, const Node& file) {
  if (options.take_null("backing")) return nullptr;
  if (options.has("backing")) return opening.open_child(options, "backing", true);
  if (!header.has_backing) return nullptr;
  if (file.filename().empty()) {
    throw Error(EINVAL, fmt::format("{}: the image records the backing file '{}', relative to "
                                    "nothing: give the option 'backing'",
                                    name_of(config, file), header.backing_file));
  }
  Options found = base::Pool::errands().run([&] {
    return backing_options(opening.policy(), file.filename(), header.backing_file,
                           header.backing_format);
  });
  if (!found.has("read-only")) found.set("read-only", "on");
  return opening.open_inline(std::move(found), "backing");
}

std::shared_ptr<Node> open_data_file(Opening& opening, const NodeConfig& config, Options& options,
                                     const Header& header, const Node& file) {
  const std::string name = name_of(config, file);
  if (!header.geometry().external_data) {
    if (!options.has("data-file")) return nullptr;
    throw Error(EINVAL,
                name + ": 'data-file' can only be set for images with an external data file");
  }
  if (options.has("data-file")) return opening.open_child(options, "data-file", config.read_only);
  if (header.data_file.empty()) {
    throw Error(EINVAL, name +
                            ": the image has an external data file and does not say which: "
                            "give the option 'data-file'");
  }
  if (file.filename().empty()) {
    throw Error(EINVAL, fmt::format("{}: the image records the data file '{}', relative to "
                                    "nothing: give the option 'data-file'",
                                    name, header.data_file));
  }
  Options found = base::Pool::errands().run([&] {
    return data_file_options(opening.policy(), file.filename(), header.data_file,
                             !config.read_only);
  });
  return opening.open_inline(std::move(found), "data-file");
}

std::unique_ptr<qcow2::Encryption> unlock(const NodeConfig& config, Options& options,
                                          const Header& header, const std::shared_ptr<Node>& file) {
  std::optional<Options::Child> given = options.take_child("encrypt");
  if (given && !given->options) {
    throw Error(EINVAL, "'encrypt' has options of its own: encrypt.key-secret=ID");
  }
  if (header.crypt_method == qcow2::kCryptNone) {
    if (!given) return nullptr;
    throw Error(EINVAL,
                name_of(config, *file) + ": No encryption in image header, but options specify it");
  }
  Options none;
  Options& encrypt = given ? *given->options : none;
  const auto format = encrypt.take_string("format");
  if (const char* real = qcow2::encryption_name(header); format && *format != real) {
    throw Error(EINVAL, fmt::format("{}: Header reported '{}' encryption format but options "
                                    "specify '{}'",
                                    name_of(config, *file), real, *format));
  }
  const crypto::UnlockOptions wanted = crypto::take_unlock_options(encrypt);
  encrypt.finish("encrypt");
  Edge edge(file, fmt::format("opening qcow2 node '{}'", config.node_name),
            {.uses = 0, .shares = Permissions::kWrite | Permissions::kResize});
  try {
    return std::make_unique<qcow2::Encryption>(edge, header, wanted);
  } catch (Error& e) {
    e.prepend(name_of(config, *file));
    throw;
  }
}

std::optional<bool> take_lazy_refcounts(Options& options, const Header& header,
                                        const std::string& name) {
  if (!options.has("lazy-refcounts")) return std::nullopt;
  const bool lazy = options.take_bool("lazy-refcounts", false);
  if (lazy && header.version < 3) {
    throw Error(EINVAL, name +
                            ": Lazy refcounts require a qcow2 image with at least qemu 1.1 "
                            "compatibility level");
  }
  return lazy;
}

[[noreturn]] void refuse_option(const std::string& name, const char* option, const char* why) {
  throw Error(ENOTSUP, fmt::format("{}: {}: {}", name, option, why));
}

// What there is no choice about: asking for what is done is right, asking for something else is
// not ignored.
void take_fixed_options(Options& options, const std::string& name) {
  for (const char* option :
       {"pass-discard-request", "pass-discard-snapshot", "pass-discard-other"}) {
    if (!options.take_bool(option, true)) {
      refuse_option(name, option,
                    "clusters that become free are always given back to the file "
                    "system");
    }
  }
  for (const char* option : {"overlap-check", "overlap-check.template"}) {
    if (options.take_choice(option, {"cached", "constant", "none", "all"}, 0) == 3) {
      refuse_option(name, option,
                    "L2 tables of snapshots are not looked at; 'cached' is what is "
                    "always done");
    }
  }
  if (options.take_uint("cache-clean-interval", 0, 0, UINT32_MAX) != 0) {
    refuse_option(name, "cache-clean-interval",
                  "caches are bounded by cache-size, not cleaned by time");
  }
}

}  // namespace

std::shared_ptr<Node> open_qcow2(Opening& opening, const NodeConfig& config, Options& options) {
  std::shared_ptr<Node> file = opening.open_child(options, "file", config.read_only);
  const std::string name = name_of(config, *file);
  const Header header = choose_snapshot(
      config, file, options, make_clean(config, file, read_supported_header(config, file), name));
  const auto total = options.take_size("cache-size");
  const auto l2 = options.take_size("l2-cache-size");
  const auto refcount = options.take_size("refcount-cache-size");
  const auto l2_entry = options.take_size("l2-cache-entry-size");
  const qcow2::CacheSizes sizes = qcow2::choose_cache_sizes(header, total, l2, refcount, l2_entry);
  const auto lazy = take_lazy_refcounts(options, header, name);
  take_fixed_options(options, name);
  Qcow2Node::Children children;
  children.data = open_data_file(opening, config, options, header, *file);
  children.backing = open_backing(opening, config, options, header, *file);
  children.encryption = unlock(config, options, header, file);
  children.file = std::move(file);
  auto node = std::make_shared<Qcow2Node>(config, std::move(children), header, sizes);
  if (lazy) node->set_lazy_refcounts(*lazy);
  return node;
}

}  // namespace minivmm::block
