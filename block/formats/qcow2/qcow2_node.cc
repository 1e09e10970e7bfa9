// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/qcow2_node.h"

#include <exception>
#include <new>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"

namespace minivmm::block {

std::unique_ptr<Edge> Qcow2Node::file_edge(const NodeConfig& config, std::shared_ptr<Node> file,
                                           const char* what) {
  if (!file) return nullptr;
  return std::make_unique<Edge>(std::move(file), "qcow2 node '" + config.node_name + "'" + what,
                                Permissions::format_file(!config.read_only));
}

Qcow2Node::Qcow2Node(const NodeConfig& config, Children children, qcow2::Header header,
                     const qcow2::CacheSizes& sizes)
    : Node(config.node_name, "qcow2", config.read_only),
      image_(file_edge(config, children.file, ""),
             file_edge(config, std::move(children.data), " (data file)"),
             std::move(children.encryption), std::move(header), !config.read_only,
             children.file->filename().empty() ? "'" + config.node_name + "'"
                                               : children.file->filename(),
             sizes),
      end_(image_.file().header().size) {
  image_.file().on_corruption(
      [this](const std::string& text) { announce_corruption(text, !this->read_only()); });
  if (children.backing) {
    backing_ = std::make_unique<Edge>(std::move(children.backing),
                                      "the overlay '" + config.node_name + "' (backing file)",
                                      Permissions::backing());
  }
  set_size(image_.file().header().size);
  Limits limits;
  const uint64_t cluster = geometry().cluster_size();
  limits.optimal_io = static_cast<uint32_t>(cluster);
  limits.discard_granularity = static_cast<uint32_t>(cluster);
  const bool compresses = !geometry().external_data && image_.encryption() == nullptr;
  limits.compress_unit = compresses ? static_cast<uint32_t>(cluster) : 0;
  limits.can_discard = can_zero_by_entry();
  limits.can_write_zeroes = can_zero_by_entry();
  if (image_.encryption() != nullptr) limits.request_alignment = crypto::kSectorSize;
  set_limits(limits);
}

void Qcow2Node::amend_encryption(const crypto::Luks1AmendOptions& options) {
  if (image_.encryption() == nullptr) {
    throw base::Error(EINVAL, describe() + ": the image is not encrypted");
  }
  if (read_only()) throw base::Error(EROFS, describe() + ": amend: the node is read-only");
  image_.prepare_write();
  image_.encryption()->amend(file(), header(), options);
}

Qcow2Node::~Qcow2Node() = default;

std::string Qcow2Node::filename() const { return image_.file().file().node().filename(); }

Facts Qcow2Node::facts() const {
  const qcow2::Header& h = header();
  Facts out;
  out.emplace_back("compat", std::string(h.version >= 3 ? "1.1" : "0.10"));
  out.emplace_back("compression-type",
                   std::string(h.compression == qcow2::Compression::kZstd ? "zstd" : "zlib"));
  if (h.version >= 3) {
    out.emplace_back("lazy-refcounts", (h.compatible & qcow2::kCompatLazyRefcounts) != 0);
  }
  out.emplace_back("refcount-bits", uint64_t{1} << h.refcount_order);
  if (h.geometry().external_data) {
    out.emplace_back("data-file", h.data_file);
    out.emplace_back("data-file-raw", h.raw_data());
  }
  if (image_.encryption() != nullptr) {
    out.emplace_back("encrypt.format", std::string(qcow2::encryption_name(h)));
  }
  if (h.version >= 3) {
    out.emplace_back("corrupt", (image_.file().incompatible() & qcow2::kIncompatCorrupt) != 0);
    out.emplace_back("extended-l2", (h.incompatible & qcow2::kIncompatExtendedL2) != 0);
  }
  return out;
}

std::string Qcow2Node::state() const {
  const auto cache = [](const char* name, const qcow2::MetadataCache& of) {
    const auto stats = of.stats();
    return fmt::format("{} cache {} of {} bytes, {} changed, {} slices read", name, stats.bytes,
                       stats.capacity, of.dirty_bytes(), stats.loads);
  };
  return fmt::format("{}; {}; {} commits; {} clusters wait to be free{}", cache("L2", image_.l2()),
                     cache("refcount", image_.refcount_blocks()), image_.commits(),
                     image_.quarantine().waiting() + image_.quarantine().matured(),
                     image_.file().broken() ? "; writes have stopped" : "");
}

std::vector<Edge*> Qcow2Node::children() {
  std::vector<Edge*> out{&file()};
  if (image_.data_file() != nullptr) out.push_back(image_.data_file());
  if (backing_) out.push_back(backing_.get());
  return out;
}

void Qcow2Node::driver_flush() { commit(); }

void Qcow2Node::after_change(bool durable) {
  if (durable || image_.under_pressure()) commit();
}

void Qcow2Node::commit() {
  image_.commit();
  if (image_.quarantine().matured() == 0) return;
  if (image_.much_to_reclaim()) {
    // The background does not keep up: the file must not grow for that.
    reclaim();
    return;
  }
  if (reclaiming_.exchange(true)) return;
  // In the background: it waits for requests that have nothing to do with this flush.
  background_.add();
  const auto ended = [this] {
    reclaiming_.store(false);
    background_.done();
  };
  try {
    base::EventLoop::current()->spawn("qcow2 reclaim", [this, ended, self = shared_from_this()] {
      reclaim();
      ended();
    });
  } catch (const std::bad_alloc&) {
    ended();  // what was flushed is flushed; a later flush frees
  }
}

void Qcow2Node::reclaim() noexcept {
  try {
    image_.reclaim(epoch_);
  } catch (const std::exception& e) {
    base::log_warning("{}: clusters could not be freed, which is tried again: {}", describe(),
                      e.what());
  }
}

void Qcow2Node::close() {
  if (read_only()) return;
  background_.wait();
  std::exception_ptr error;
  try {
    image_.bitmaps().store();
  } catch (...) {
    error = std::current_exception();
    base::log_warning("{}: its bitmaps could not be stored and are inconsistent now: {}",
                      describe(), base::text_of(error));
  }
  image_.finish(epoch_);
  if (error) std::rethrow_exception(error);
}

}  // namespace minivmm::block
