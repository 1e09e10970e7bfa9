// SPDX-License-Identifier: Apache-2.0
// The disks of a clone export that are in use: one a connection, or, for clients that give a name
// ("golden/alice"), one a name. Owned by the export that is cloned. Fibers of any loop.
#pragma once

#include <string>
#include <string_view>

#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "base/sync.h"
#include "nbd-server/server.h"

namespace minivmm::nbd {

class Export;

// True for what a client may call itself: 1 to 64 of A-Z a-z 0-9 . _ -, no dot in front.
bool is_client_name(std::string_view name) noexcept;

class Clones {
 public:
  explicit Clones(std::shared_ptr<CloneSource> source) : source_(std::move(source)) {}
  Clones(const Clones&) = delete;
  Clones& operator=(const Clones&) = delete;

  // A disk of `origin` for a client: a new one, or that which connections of this name use already.
  // To be given back. Throws what making it throws.
  std::shared_ptr<Export> take(const std::shared_ptr<Export>& origin, const std::string& client);
  // The last who gives it back closes it.
  void give_back(std::shared_ptr<Export> clone) noexcept;

 private:
  // The disk of clients of one name. It is opened and closed under `changing`: who comes while it
  // is being closed gets what it was closed with. Other names do not wait for that.
  struct Named {
    base::FiberMutex changing;
    std::shared_ptr<Export> clone;  // under changing
    unsigned users = 0;             // under changing
    unsigned interested = 0;        // guarded by mutex_; users, and who is to become one
  };
  std::shared_ptr<Export> make(const std::shared_ptr<Export>& origin, const std::string& client);
  void close(Export& clone) noexcept;
  std::shared_ptr<Named> enter(const std::string& client);
  void leave(const std::string& client) noexcept;

  const std::shared_ptr<CloneSource> source_;
  std::mutex mutex_;                                     // held for no more than a look
  std::map<std::string, std::shared_ptr<Named>> named_;  // guarded by mutex_
};

}  // namespace minivmm::nbd
