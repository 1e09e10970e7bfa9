// SPDX-License-Identifier: Apache-2.0
#include "base/cancel.h"

namespace minivmm::base {

CancelSource::Registration::Registration(CancelSource* source, Callback callback,
                                         void* argument) noexcept
    : source_(source), callback_(callback), argument_(argument) {
  if (source_ == nullptr) return;
  next_ = source_->head_;
  if (next_ != nullptr) next_->prev_ = this;
  source_->head_ = this;
}

CancelSource::Registration::~Registration() {
  if (source_ == nullptr) return;
  (prev_ != nullptr ? prev_->next_ : source_->head_) = next_;
  if (next_ != nullptr) next_->prev_ = prev_;
}

void CancelSource::cancel() noexcept {
  if (cancelled_) return;
  cancelled_ = true;
  // Callbacks only ask; no fiber runs, so nobody unlinks during the walk.
  for (Registration* r = head_; r != nullptr; r = r->next_) r->callback_(r->argument_);
}

}  // namespace minivmm::base
