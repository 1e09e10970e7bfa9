// SPDX-License-Identifier: Apache-2.0
#include "block/graph/handle.h"

#include <cerrno>
#include <exception>
#include <utility>

#include "base/checked.h"
#include "base/error.h"
#include "block/graph/graph.h"
#include "block/graph/root.h"

namespace minivmm::block {

Handle::Root::Root(Graph& g, std::shared_ptr<Node> node, std::string user, Permissions permissions)
    : graph(g), edge(std::move(node), std::move(user), permissions, EdgeKind::kRoot) {}

base::Epoch::Pin Handle::Root::enter() {
  base::Epoch::Pin pin(in_flight_);
  // After the pin: a drain that holds after this load sees the pin and waits for it.
  if (held_.load(std::memory_order_seq_cst) != 0) [[unlikely]]
    return park(std::move(pin));
  return pin;
}

base::Epoch::Pin Handle::Root::try_enter() noexcept {
  base::Epoch::Pin pin(in_flight_);
  if (held_.load(std::memory_order_seq_cst) != 0) [[unlikely]]
    pin.release();
  return pin;
}

// At each moment it is parked or has a pin: finish() sees the one or the other.
base::Epoch::Pin Handle::Root::park(base::Epoch::Pin entered) {
  std::unique_lock lock(mutex_);
  ++parked_;
  entered.release();
  for (;;) {
    while (held_.load(std::memory_order_seq_cst) != 0) let_in_.wait(lock, "the end of a drain");
    base::Epoch::Pin pin(in_flight_);
    if (held_.load(std::memory_order_seq_cst) != 0) continue;
    if (--parked_ == 0) none_parked_.notify_all();
    return pin;
  }
}

void Handle::Root::let_go() noexcept {
  const std::lock_guard lock(mutex_);
  if (held_.fetch_sub(1, std::memory_order_seq_cst) == 1) let_in_.notify_all();
}

void Handle::Root::finish() {
  ending.store(true, std::memory_order_relaxed);
  std::unique_lock lock(mutex_);
  while (parked_ != 0 || in_flight() != 0) {
    while (parked_ != 0) none_parked_.wait(lock, "requests that a drain holds back");
    lock.unlock();
    (void)wait_idle(base::Clock::time_point::max());
    lock.lock();
  }
  lock.unlock();
  if (!written.load(std::memory_order_acquire)) return;
  const base::Epoch::Pin pin = enter();  // a drain waits for it, or holds it back
  edge.flush();
}

Handle::Handle(std::unique_ptr<Root> root) noexcept : root_(std::move(root)) {}
Handle::Handle(Handle&&) noexcept = default;

Handle& Handle::operator=(Handle&& other) noexcept {
  if (this != &other) {
    if (root_) root_->graph.reap(std::move(root_));
    root_ = std::move(other.root_);
  }
  return *this;
}

Handle::~Handle() {
  if (root_) root_->graph.reap(std::move(root_));
}

void Handle::read(uint64_t offset, IoSpan to) {
  const auto pin = root_->enter();
  root_->edge.read(offset, to);
}

namespace {

// At the end of a changing request: lets go of its pin and tells the watchers. In this order: a
// watcher may wait for a request that a drain holds back, and the drain waits for pins.
class TellWatchers {
 public:
  TellWatchers(Edge& edge, base::Epoch::Pin& pin, uint64_t offset, uint64_t length) noexcept
      : edge_(edge), pin_(pin), offset_(offset), length_(length) {}
  ~TellWatchers() {
    if (edge_.node().watched()) [[unlikely]] {
      const std::shared_ptr<Node> node = edge_.shared_node();
      pin_.release();
      node->content_changed(edge_, offset_, length_);
    }
  }
  TellWatchers(const TellWatchers&) = delete;
  TellWatchers& operator=(const TellWatchers&) = delete;

 private:
  Edge& edge_;
  base::Epoch::Pin& pin_;
  const uint64_t offset_;
  const uint64_t length_;
};

// Read-mostly: the first write of many sets it.
void mark(std::atomic<bool>& flag) noexcept {
  if (!flag.load(std::memory_order_relaxed)) flag.store(true, std::memory_order_release);
}

}  // namespace

void Handle::write(uint64_t offset, IoSpan from, WriteFlags flags) {
  auto pin = root_->enter();
  const TellWatchers tell(root_->edge, pin, offset, from.bytes());
  mark(root_->written);
  root_->edge.write(offset, from, flags);
}

void Handle::write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  auto pin = root_->enter();
  const TellWatchers tell(root_->edge, pin, offset, length);
  mark(root_->written);
  root_->edge.write_zeroes(offset, length, flags);
}

void Handle::discard(uint64_t offset, uint64_t length) {
  auto pin = root_->enter();
  const TellWatchers tell(root_->edge, pin, offset, length);
  mark(root_->written);
  root_->edge.discard(offset, length);
}

void Handle::flush() {
  const auto pin = root_->enter();
  root_->edge.flush();
}

BlockStatus Handle::block_status(uint64_t offset, uint64_t length) {
  const auto pin = root_->enter();
  return root_->edge.block_status(offset, length);
}

void Handle::prefetch(uint64_t offset, uint64_t length) {
  const auto pin = root_->enter();
  root_->edge.prefetch(offset, length);
}

bool Handle::lend(uint64_t offset, uint64_t length, Loan& to) noexcept {
  base::Epoch::Pin pin = root_->try_enter();
  if (pin && to.pin(std::move(pin)) && root_->edge.lend(offset, length, to)) [[likely]]
    return true;
  to.give_back();
  return false;
}

void Handle::truncate(uint64_t new_size) {
  auto pin = root_->enter();
  mark(root_->written);
  Node& node = root_->edge.node();
  const uint64_t old_size = node.size();
  root_->edge.truncate(new_size);
  const std::shared_ptr<Node> kept = node.shared_from_this();
  pin.release();  // as above
  if (new_size != old_size) node.size_changed(old_size, new_size);
}

std::vector<DirtyBitmaps::Info> Handle::dirty_bitmaps() {
  const auto pin = root_->enter();
  DirtyBitmaps* const bitmaps = root_->edge.node().dirty_bitmaps();
  return bitmaps != nullptr ? bitmaps->list() : std::vector<DirtyBitmaps::Info>();
}

DirtyBitmaps::Status Handle::dirty_status(std::string_view bitmap, uint64_t offset,
                                          uint64_t length) {
  const auto pin = root_->enter();
  DirtyBitmaps* const bitmaps = root_->edge.node().dirty_bitmaps();
  if (bitmaps == nullptr) throw base::Error(ENOENT, describe() + " has no dirty bitmaps");
  if (length == 0 || !base::range_fits(offset, length, size())) {
    throw base::Error(EINVAL, describe() + ": a range that is not inside the disk");
  }
  return bitmaps->status(bitmap, offset, length);
}

uint64_t Handle::size() const noexcept { return root_->edge.size(); }
bool Handle::writable() const noexcept { return root_->edge.permissions().can_write(); }
const Limits& Handle::limits() const noexcept { return root_->edge.node().limits(); }
std::string Handle::describe() const { return root_->edge.node().describe(); }
const std::string& Handle::node_name() const noexcept { return root_->edge.node().name(); }

void Handle::watch(std::shared_ptr<Node::ContentWatcher> watcher) {
  const auto pin = root_->enter();
  root_->edge.node().add_watcher(root_->edge, std::move(watcher));
}

void Handle::close() {
  if (!root_) return;
  std::exception_ptr error;
  try {
    root_->finish();
  } catch (...) {
    error = std::current_exception();
  }
  Graph& graph = root_->graph;
  // Not before: requests in flight look at it.
  graph.unregister_root(std::move(root_));
  if (error) std::rethrow_exception(error);
}

}  // namespace minivmm::block
