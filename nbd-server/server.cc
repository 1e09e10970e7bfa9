// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/server.h"

#include <cerrno>
#include <utility>

#include "base/error.h"
#include "nbd-server/core.h"

namespace minivmm::nbd {

Server::Server(base::LoopGroup& loops, ServerOptions options)
    : core_(std::make_shared<Core>(loops, options)) {}

Server::~Server() { core_->abandon(); }

void Server::add_export(std::string name, block::Handle handle, ExportOptions options) {
  if (!handle) throw base::Error(EINVAL, "an NBD export needs an open handle");
  core_->add_export(
      std::make_shared<Export>(std::move(name), std::move(handle), std::move(options)));
}

void Server::add_clone_export(std::string name, block::Handle base,
                              std::shared_ptr<CloneSource> clones, ExportOptions options) {
  if (!base) throw base::Error(EINVAL, "an NBD export needs an open handle");
  options.writable = true;
  core_->add_export(std::make_shared<Export>(std::move(name), std::move(base), std::move(options),
                                             std::move(clones)));
}

void Server::remove_export(const std::string& name, base::Clock::time_point deadline,
                           bool only_unused) {
  core_->remove_export(name, deadline, only_unused);
}
std::string Server::listen(ListenOptions options) { return core_->listen(std::move(options)); }
void Server::serve(base::UniqueFd connected) { core_->serve(std::move(connected)); }
std::vector<std::string> Server::uris() const { return core_->uris(); }
std::vector<std::string> Server::stop(base::Clock::time_point deadline) {
  return core_->stop(deadline);
}
std::vector<std::string> Server::describe() const { return core_->describe(); }

}  // namespace minivmm::nbd
