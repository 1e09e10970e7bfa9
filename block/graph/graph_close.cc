// SPDX-License-Identifier: Apache-2.0
// How nodes go: they are taken out of the graph under its lock, and closed without it; and how what
// is being opened is given up.
#include <algorithm>
#include <cerrno>
#include <new>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/graph/edge.h"
#include "block/graph/graph.h"
#include "block/graph/opening.h"
#include "block/graph/root.h"

namespace minivmm::block {

using base::Error;

namespace {

// For front ends that are ending: more than a driver waits for a silent server.
constexpr auto kUsersPatience = std::chrono::seconds(60);

}  // namespace

// The node, and what was opened for it and nobody else uses; parents first. Under editing_.
Graph::Nodes Graph::going_with(const std::shared_ptr<Node>& node) const {
  const std::lock_guard lock(mutex_);
  Nodes out{node};
  std::vector<const Node*> used;  // by those in `out`, once for each edge
  const auto note_children = [&used](Node& parent) {
    for (const Edge* edge : parent.children()) used.push_back(&edge->node());
  };
  note_children(*node);
  const auto self = std::find_if(nodes_.rbegin(), nodes_.rend(),
                                 [&](const Entry& entry) { return entry.node == node; });
  // Children lie before their parents.
  for (auto it = self; it != nodes_.rend(); ++it) {
    if (it->named || it->node == node) continue;
    const auto uses = std::count(used.begin(), used.end(), it->node.get());
    if (uses == 0 || static_cast<size_t>(uses) != it->node->users().size()) continue;
    out.push_back(it->node);
    note_children(*it->node);
  }
  return out;
}

// Whether its users are front ends' handles that wait for their last requests.
bool Graph::only_ending_users(const Node& node) const {
  const std::lock_guard lock(mutex_);
  const auto ending = std::count_if(roots_.begin(), roots_.end(), [&](const Handle::Root* root) {
    return &root->edge.node() == &node && root->ending.load(std::memory_order_relaxed);
  });
  return static_cast<size_t>(ending) == node.users().size();
}

// The node, once it has no users; under editing_ before and after. Throws ENOENT, EBUSY.
std::shared_ptr<Node> Graph::wait_for_users(Editing& editing, const std::string& node_name) {
  const auto until = base::Clock::now() + kUsersPatience;
  for (;;) {
    std::shared_ptr<Node> node = find(node_name);
    const auto users = node->users();
    if (users.empty()) return node;
    if (!only_ending_users(*node) || base::Clock::now() >= until) {
      throw Error(EBUSY,
                  fmt::format("{}: is in use by {}", node->describe(), fmt::join(users, ", ")));
    }
    for (const auto& each : going_with(node)) each->closing();
    std::unique_lock lock(mutex_);
    editing.unlock();
    node.reset();
    (void)gone_.wait_until(lock, until, "the last users of a node");
    lock.unlock();
    editing.lock();
  }
}

// Under editing_: nobody finds them any more.
void Graph::take_out(const Nodes& going) {
  const std::lock_guard lock(mutex_);
  std::vector<Closing> all = closing_;
  for (const auto& node : going) {
    all.push_back({node, {}});
    for (const Edge* edge : node->children()) all.back().children.push_back(edge->shared_node());
  }
  closing_.swap(all);
  std::erase_if(nodes_, [&](const Entry& entry) {
    return std::find(going.begin(), going.end(), entry.node) != going.end();
  });
}

// Of one that was taken out and that nobody uses. Returns what went wrong; logs it where `first`
// says that there is an error already.
std::exception_ptr Graph::close_one(std::shared_ptr<Node> node,
                                    const std::exception_ptr& first) noexcept {
  {
    // What a look waits for ends: the node was told that it is closing.
    std::unique_lock lock(mutex_);
    while (looked_at(node.get())) gone_.wait(lock, "those who look at a node");
  }
  std::exception_ptr error;
  try {
    node->close();
  } catch (const std::exception& e) {
    error = std::current_exception();
    if (first) base::log_error("{}: closing: {}", node->describe(), e.what());
  }
  std::unique_lock lock(mutex_);
  std::erase_if(closing_, [&](const Closing& each) { return each.node == node; });
  lock.unlock();
  node.reset();  // its edges let go of its children, and its file is free
  lock.lock();
  gone_.notify_all();
  return error;
}

// One after the other. Keeps the first error, unless `first` has one.
void Graph::close_taken(Nodes taken, std::exception_ptr& first) noexcept {
  for (const auto& each : taken) each->closing();
  for (auto& each : taken) {
    std::exception_ptr error = close_one(std::move(each), first);
    if (!first) first = std::move(error);
  }
}

void Graph::remove(const std::string& node_name) {
  Editing editing(editing_);
  Nodes going;
  for (;;) {
    going = going_with(wait_for_users(editing, node_name));
    std::unique_lock lock(mutex_);
    if (std::none_of(going.begin(), going.end(),
                     [&](const auto& each) { return is_drained(*each); })) {
      break;
    }
    going.clear();  // the graph has them
    wait_for_drain(editing, lock);
  }
  take_out(going);
  editing.unlock();
  std::exception_ptr error;
  close_taken(std::move(going), error);
  if (error) std::rethrow_exception(error);
}

// Parents before their children. Null: there is none. Under editing_.
std::shared_ptr<Node> Graph::take_unused() {
  std::shared_ptr<Node> node;
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(nodes_.rbegin(), nodes_.rend(),
                                    [](const Entry& entry) { return entry.node->users().empty(); });
    if (found != nodes_.rend()) node = found->node;
  }
  if (node) take_out({node});
  return node;
}

// --- nodes that do not come to be ---

bool Graph::give_up_opening(const std::string& node_name) {
  const auto until = base::Clock::now() + kUsersPatience;
  std::unique_lock lock(mutex_);
  const auto find_it = [&]() -> Opening* {
    for (Opening* each : openings_) {
      if (each->name_ == node_name) return each;
    }
    return nullptr;
  };
  Opening* const opening = find_it();
  if (opening == nullptr) return false;
  const std::string why = "the node was deleted meanwhile";
  const auto calls = opening->give_up(why);
  lock.unlock();
  for (const auto& call : calls) call(why);
  lock.lock();
  // The name is its alone until it has ended.
  while (find_it() == opening && !opening->given_up_.empty()) {
    if (gone_.wait_until(lock, until, "the end of an opening")) continue;
    throw Error(EBUSY, opening->describe() + " was given up and has not ended yet");
  }
  return true;
}

void Graph::end_openings() {
  const std::string why = "all nodes are being closed";
  std::vector<Opening::GiveUp> calls;
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
    for (Opening* each : openings_) {
      for (auto& call : each->give_up(why)) calls.push_back(std::move(call));
    }
  }
  for (const auto& call : calls) call(why);
}

// --- all of them ---

// Fibers rely on editing_, which this holds meanwhile.
void Graph::close_side_by_side(std::exception_ptr& first_error) {
  Editing editing(editing_);
  for (std::unique_lock lock(mutex_); !drained_.empty(); lock.lock()) wait_for_drain(editing, lock);
  base::WaitGroup group;
  const auto close_it = [&](std::shared_ptr<Node> node) {
    std::exception_ptr error = close_one(std::move(node), first_error);
    if (!first_error) first_error = std::move(error);
  };
  const std::function<void()> go_on = [&] {
    while (std::shared_ptr<Node> node = take_unused()) {
      group.add();
      try {
        base::EventLoop::current()->spawn("close node", [&, node]() mutable {
          close_it(std::move(node));
          go_on();  // its children
          group.done();
        });
      } catch (const std::bad_alloc&) {
        group.done();
        close_it(std::move(node));  // here then; its children come next
      }
    }
  };
  go_on();
  group.wait();
}

void Graph::close() {
  end_openings();
  {
    // First: handles that are closed in the background may wait for a server.
    const std::lock_guard editing(editing_);
    const std::lock_guard lock(mutex_);
    for (const Entry& entry : nodes_) entry.node->closing();
  }
  reaping_.wait();
  std::exception_ptr error;
  close_side_by_side(error);
  {
    std::unique_lock lock(mutex_);
    while (!closing_.empty() || !openings_.empty()) {
      gone_.wait(lock, "nodes that are being opened or closed");
    }
  }
  close_side_by_side(error);  // what those used
  {
    const std::lock_guard lock(mutex_);
    if (!nodes_.empty() && !error) {
      error = std::make_exception_ptr(Error(
          EBUSY,
          fmt::format("{}: cannot be closed: it is in use by {}", nodes_.back().node->describe(),
                      fmt::join(nodes_.back().node->users(), ", "))));
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace minivmm::block
