// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/resources.h"

namespace minivmm::nbd {

Resources::~Resources() {
  while (free_ != nullptr) {
    Request* const next = free_->next;
    delete free_;
    free_ = next;
  }
}

Request& Resources::take_request() {
  if (free_ == nullptr) return *new Request;
  Request& out = *free_;
  free_ = out.next;
  --kept_;
  out.next = nullptr;
  return out;
}

void Resources::give_back(Request& request) noexcept {
  request.loan.give_back();
  buffers_.give_back(std::move(request.buffer));
  if (kept_ >= kMaxKept) {
    delete &request;
    return;
  }
  request.buffer = base::Pages();
  request.payload = nullptr;
  request.block = nullptr;
  request.charge = 0;
  request.reply.data_size = 0;
  request.reply.header_size = 0;
  request.more.clear();
  request.rereadable = false;
  request.bare = false;
  request.shed = false;
  request.redo = false;
  request.no_loan = false;
  request.next = free_;
  free_ = &request;
  ++kept_;
}

}  // namespace minivmm::nbd
