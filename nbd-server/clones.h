// SPDX-License-Identifier: Apache-2.0
// The disks of a clone export that are in use: one a connection, or, for clients that give a name
// ("golden/alice"), one a name. Owned by the export that is cloned. Fibers of any loop.
#pragma once

#include <string>
#include <string_view>

#include <map>
#include <memory>
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
  std::shared_ptr<Export> make(const std::shared_ptr<Export>& origin, const std::string& client);
  void close(Export& clone) noexcept;

  const std::shared_ptr<CloneSource> source_;
  // Those with a name are opened and closed one after the other: who comes while his disk is being
  // closed gets what it was closed with.
  base::FiberMutex mutex_;
  struct Shared {
    std::shared_ptr<Export> clone;
    unsigned users = 0;
  };
  std::map<std::string, Shared> named_;  // under mutex_
};

}  // namespace minivmm::nbd
