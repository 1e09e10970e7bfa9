// SPDX-License-Identifier: Apache-2.0
// Asks waiting fibers to stop waiting. A CancelSource belongs to one loop: it is used, and cancel()
// is called, on that loop's thread (post() there from elsewhere). Cancelling is asking: an
// operation in flight still completes, and its fiber is resumed only then.
#pragma once

namespace minivmm::base {

class CancelSource {
 public:
  CancelSource() = default;
  CancelSource(const CancelSource&) = delete;
  CancelSource& operator=(const CancelSource&) = delete;

  // Idempotent. Waits made later end at once.
  void cancel() noexcept;
  bool cancelled() const noexcept { return cancelled_; }

  // One waiting operation; lives on the waiting fiber's stack, linked while it waits.
  class Registration {
   public:
    using Callback = void (*)(void* argument) noexcept;
    // `source` may be nullptr. The callback runs on the loop's thread, at most once.
    Registration(CancelSource* source, Callback callback, void* argument) noexcept;
    ~Registration();
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;

   private:
    friend class CancelSource;
    CancelSource* source_;
    Callback callback_;
    void* argument_;
    Registration* prev_ = nullptr;
    Registration* next_ = nullptr;
  };

 private:
  bool cancelled_ = false;
  Registration* head_ = nullptr;
};

}  // namespace minivmm::base
