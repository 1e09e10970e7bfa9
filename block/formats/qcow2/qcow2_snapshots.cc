// SPDX-License-Identifier: Apache-2.0
// The node's internal snapshots, as Node::snapshots() gives them: what SnapshotSet does, with the
// disk's size, its bitmaps and its users' caches brought along.
#include <cerrno>

#include "block/formats/qcow2/qcow2_node.h"
#include "block/graph/snapshots.h"

namespace minivmm::block {

class Qcow2Node::SnapshotCommands final : public Snapshots {
 public:
  explicit SnapshotCommands(Qcow2Node& node) : node_(node) {}
  ~SnapshotCommands() = default;

  const Node& node() const noexcept override { return node_; }

  std::vector<Info> list() override {
    std::vector<Info> out;
    for (const qcow2::SnapshotEntry& entry : node_.image_.snapshots().entries()) {
      out.push_back(
          {entry.id, entry.name, entry.disk_size, entry.vm_state_bytes, entry.date_seconds});
    }
    return out;
  }

  std::string create(std::string_view name) override {
    prepare();
    return node_.image_.snapshots().create(name, node_.size(), node_.epoch_);
  }

  void apply(std::string_view id_or_name) override {
    prepare();
    qcow2::Bitmaps& bitmaps = node_.image_.bitmaps();
    bitmaps.prepare_resize();
    const uint64_t old_size = node_.size();
    const uint64_t size = node_.image_.snapshots().apply(id_or_name, old_size, node_.epoch_);
    node_.end_.store(size);
    node_.set_size(size);
    if (size != old_size) bitmaps.resize(size);
    bitmaps.mark(0, size);
    node_.content_changed(node_.file(), 0, std::max(size, old_size));
  }

  void remove(std::string_view name, std::string_view id) override {
    prepare();
    node_.image_.snapshots().remove(name, id, node_.epoch_);
  }

 private:
  void prepare() {
    if (node_.read_only()) {
      throw base::Error(EROFS, node_.describe() + ": the image is open read-only");
    }
    node_.image_.prepare_write();
    node_.background_.wait();
  }

  Qcow2Node& node_;
};

Snapshots* Qcow2Node::snapshots() noexcept {
  if (!snapshots_) snapshots_ = std::make_shared<SnapshotCommands>(*this);
  return snapshots_.get();
}

}  // namespace minivmm::block
