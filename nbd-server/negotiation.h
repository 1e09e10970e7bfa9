// SPDX-License-Identifier: Apache-2.0
// The handshake with one client: fixed newstyle, option by option, until it has chosen an export
// or left. Lives on the connection's fiber for that long. Everything a client sends is bounded
// before memory is spent on it, and the whole handshake in time.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "nbd-server/export.h"
#include "nbd-server/meta_context.h"
#include "nbd-server/stream.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd {

// What a listener asks of its clients.
struct Security {
  TlsOptions::Mode mode = TlsOptions::Mode::kOff;
  std::shared_ptr<const TlsCredentials> credentials;  // unless off
};

// What was agreed on.
struct Agreement {
  ExportUse target;
  ExportSeat seat = {};
  std::string client = {};  // the name that TLS has proved; empty: none
  wire::Headers headers = wire::Headers::kSimple;
  std::vector<MetaContext> contexts = {};  // at most kMostContexts

  // READs are answered by chunks, which can tell of holes and of errors.
  bool structured() const noexcept { return headers != wire::Headers::kSimple; }
  bool extended() const noexcept { return headers == wire::Headers::kExtended; }
  // All of `contexts`, as requests name them.
  uint32_t every_context() const noexcept {
    return static_cast<uint32_t>((uint64_t{1} << contexts.size()) - 1);
  }
};

class Negotiation {
 public:
  // Option data beyond this is skipped and refused; beyond kMaxSkipped the client is cut off.
  static constexpr uint32_t kMaxOptionData = 32 << 10;
  static constexpr uint32_t kMaxSkipped = 1 << 20;

  // Told which export the client has chosen, before anything about it may have to wait; null: it
  // has not after all. False: the export is being withdrawn.
  using Chosen = std::function<bool(const std::shared_ptr<Export>& target)>;

  Negotiation(Stream& stream, const ExportTable& exports, base::CancelSource& cancel,
              base::Clock::time_point deadline, const Security& security, Chosen chosen)
      : stream_(stream),
        exports_(exports),
        cancel_(cancel),
        deadline_(deadline),
        security_(security),
        chosen_(std::move(chosen)) {}

  // Nullopt: the client left, was too slow, or broke the protocol; outcome() says which.
  std::optional<Agreement> run();
  const char* outcome() const noexcept { return outcome_; }

 private:
  enum class Next { kOption, kTransmission, kEnd };
  using Data = std::span<const std::byte>;
  struct Row {
    wire::Option option;
    Next (Negotiation::*handle)(Data data);
  };
  static const Row kTable[];

  bool greet();
  bool take_turn();
  Next take_option();
  Next dispatch(Data data, bool too_much);
  Next refuse_size();
  bool must_start_tls() const noexcept;
  bool may_use(const Export& target) const noexcept;
  ExportUse find(std::string_view name);
  Next export_name(Data data);
  Next abort(Data data);
  Next list(Data data);
  Next info(Data data);
  Next go(Data data);
  Next structured_reply(Data data);
  Next extended_headers(Data data);
  Next start_tls(Data data);
  Next list_meta_context(Data data);
  Next set_meta_context(Data data);

  enum class Purpose { kInfo, kUse };
  ExportUse describe_export(Data data, Purpose purpose);
  bool enter(ExportUse& use);
  static std::vector<MetaContext> contexts_of(const ExportUse& use);
  void describe_context(const MetaContext& context, uint32_t id);
  void choose(ExportUse chosen);
  bool sit_down(const std::shared_ptr<Export>& target);
  void forget_contexts() noexcept;
  bool skip(uint32_t length);
  // Replies gather in out_ until the option has been dealt with.
  void reply(wire::OptionReply type, Data data = {});
  void reply_text(wire::OptionReply type, std::string_view text);
  void reply_tls_needed(std::string_view text);
  bool send();
  Next end(const char* why) noexcept;

  Stream& stream_;
  const ExportTable& exports_;
  base::CancelSource& cancel_;
  const base::Clock::time_point deadline_;
  const Security& security_;
  const Chosen chosen_;
  const char* outcome_ = "it left during the handshake";

  uint32_t option_ = 0;  // the one being dealt with
  std::vector<std::byte> in_;
  std::vector<std::byte> out_;

  bool no_zeroes_ = false;
  bool fixed_ = false;  // the client speaks fixed newstyle; without it there is no TLS
  Agreement agreed_;
  // The export that the selected contexts are for, by its full name.
  std::optional<std::string> contexts_for_;
};

}  // namespace minivmm::nbd
