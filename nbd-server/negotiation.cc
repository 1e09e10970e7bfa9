// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/negotiation.h"

#include <algorithm>
#include <array>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"
#include "nbd-server/option_data.h"

namespace minivmm::nbd {

using wire::Option;
using wire::OptionReply;

namespace {

// What a client said is said again only where it is a short line of text in any encoding.
bool is_plain(std::string_view said) noexcept {
  return said.size() <= 256 &&
         std::all_of(said.begin(), said.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

}  // namespace

const Negotiation::Row Negotiation::kTable[] = {
    {Option::kExportName, &Negotiation::export_name},
    {Option::kAbort, &Negotiation::abort},
    {Option::kList, &Negotiation::list},
    {Option::kStartTls, &Negotiation::start_tls},
    {Option::kInfo, &Negotiation::info},
    {Option::kGo, &Negotiation::go},
    {Option::kStructuredReply, &Negotiation::structured_reply},
    {Option::kListMetaContext, &Negotiation::list_meta_context},
    {Option::kSetMetaContext, &Negotiation::set_meta_context},
    {Option::kExtendedHeaders, &Negotiation::extended_headers},
};

std::optional<Agreement> Negotiation::run() {
  if (!greet()) return std::nullopt;
  while (take_turn()) {
    switch (take_option()) {
      case Next::kOption:
        break;
      case Next::kTransmission:
        return std::move(agreed_);
      case Next::kEnd:
        return std::nullopt;
    }
  }
  return std::nullopt;
}

// A client that always has more to say never makes this wait: others get their turn here, and its
// own time ends.
bool Negotiation::take_turn() {
  base::EventLoop::current()->yield();
  if (cancel_.cancelled()) return false;
  if (base::Clock::now() < deadline_) return true;
  outcome_ = "its handshake took too long";
  return false;
}

bool Negotiation::greet() {
  const auto hello = wire::encode_hello();
  std::array<std::byte, 4> answer;
  if (!stream_.send_all(hello, cancel_, deadline_) ||
      !stream_.receive_all(answer, cancel_, deadline_)) {
    return false;
  }
  const auto flags = base::load_be<uint32_t>(answer.data());
  if ((flags & ~wire::kKnownClientFlags) != 0) {
    outcome_ = "it set handshake flags that do not exist";
    return false;
  }
  no_zeroes_ = (flags & wire::kNoZeroes) != 0;
  fixed_ = (flags & wire::kFixedNewstyle) != 0;
  return true;
}

Negotiation::Next Negotiation::end(const char* why) noexcept {
  outcome_ = why;
  return Next::kEnd;
}

Negotiation::Next Negotiation::take_option() {
  std::array<std::byte, wire::kOptionHeaderSize> bytes;
  if (!stream_.receive_all(bytes, cancel_, deadline_)) return Next::kEnd;
  const auto header = wire::decode_option_header(bytes);
  if (!header) return end("it sent an option without its magic");
  option_ = header->option;
  if (header->length > kMaxSkipped) return end("it announced far too much data for an option");
  const bool too_much = header->length > kMaxOptionData;
  in_.resize(too_much ? 0 : header->length);
  if (too_much ? !skip(header->length) : !stream_.receive_all(in_, cancel_, deadline_)) {
    return Next::kEnd;
  }
  const Next next = dispatch(in_, too_much);
  if (!send()) return Next::kEnd;
  return next;
}

// `too_much`: there was more data than any option needs, and it was not kept.
Negotiation::Next Negotiation::dispatch(Data data, bool too_much) {
  if (must_start_tls()) {
    if (option_ == static_cast<uint32_t>(Option::kExportName)) return end("it did not start TLS");
    reply_tls_needed("this server talks by TLS only");
    return Next::kOption;
  }
  const bool offers_tls = security_.mode != TlsOptions::Mode::kOff;
  if (!offers_tls && option_ == static_cast<uint32_t>(Option::kStartTls)) {
    reply_text(OptionReply::kErrUnsup, "this server offers no TLS");
    return Next::kOption;
  }
  if (!fixed_ && option_ == static_cast<uint32_t>(Option::kStartTls)) {
    reply_text(OptionReply::kErrPolicy, "TLS is for clients that speak fixed newstyle");
    return Next::kOption;
  }
  for (const Row& row : kTable) {
    if (static_cast<uint32_t>(row.option) != option_) continue;
    if (too_much) return refuse_size();
    try {
      return (this->*row.handle)(data);
    } catch (const base::Error& e) {
      reply_text(OptionReply::kErrInvalid, e.what());
      return Next::kOption;
    }
  }
  reply_text(OptionReply::kErrUnsup, "this server does not know the option");
  return Next::kOption;
}

bool Negotiation::must_start_tls() const noexcept {
  return security_.mode == TlsOptions::Mode::kRequired && stream_.tls() == nullptr &&
         option_ != static_cast<uint32_t>(Option::kStartTls) &&
         option_ != static_cast<uint32_t>(Option::kAbort);
}

Negotiation::Next Negotiation::start_tls(Data data) {
  if (!data.empty()) throw base::Error(EINVAL, "STARTTLS takes no data");
  if (stream_.tls() != nullptr) throw base::Error(EINVAL, "TLS was started already");
  reply(OptionReply::kAck);
  if (!send()) return Next::kEnd;
  // What was said in the clear may have been somebody else's words.
  agreed_ = {};
  forget_contexts();
  try {
    if (!stream_.start_tls(security_.credentials, cancel_, deadline_)) {
      return end("it did not finish TLS's handshake");
    }
    agreed_.client = base::Pool::work().run([this] { return stream_.tls()->peer_name(); });
  } catch (const base::Error& e) {
    static base::RateLimit limit;
    uint64_t suppressed = 0;
    if (limit.allow(&suppressed)) {
      base::log_warning("an NBD client ({}) was refused: {}", stream_.peer(), e.what());
    }
    return end("TLS failed");
  }
  return Next::kOption;
}

bool Negotiation::may_use(const Export& target) const noexcept {
  return target.allows(agreed_.client);
}

// Empty: there is no such export for this client, and it has been told.
ExportUse Negotiation::find(std::string_view name) {
  ExportUse found = exports_.find(name);
  if (found && may_use(*found)) return found;
  // Only these two options may be answered so.
  const bool may_ask = option_ == static_cast<uint32_t>(Option::kInfo) ||
                       option_ == static_cast<uint32_t>(Option::kGo);
  if (!found) {
    reply_text(OptionReply::kErrUnknown, is_plain(name)
                                             ? fmt::format("there is no export '{}'", name)
                                             : "there is no such export");
  } else if (security_.mode != TlsOptions::Mode::kOff && stream_.tls() == nullptr && may_ask) {
    reply_tls_needed("this export is for clients with TLS");
  } else {
    reply_text(OptionReply::kErrPolicy, "this export is for other clients");
  }
  return {};
}

Negotiation::Next Negotiation::refuse_size() {
  if (option_ == static_cast<uint32_t>(Option::kExportName)) return end("it sent a bad name");
  // As any failed selection.
  if (option_ == static_cast<uint32_t>(Option::kSetMetaContext)) forget_contexts();
  reply_text(OptionReply::kErrTooBig, "more data than any option needs");
  return Next::kOption;
}

bool Negotiation::skip(uint32_t length) {
  std::array<std::byte, 1024> sink;
  while (length > 0) {
    const auto part = std::min<size_t>(length, sink.size());
    if (!stream_.receive_all(std::span(sink).first(part), cancel_, deadline_)) return false;
    length -= static_cast<uint32_t>(part);
  }
  return true;
}

void Negotiation::reply(OptionReply type, Data data) {
  const auto header = wire::encode_option_reply(option_, type, static_cast<uint32_t>(data.size()));
  out_.insert(out_.end(), header.begin(), header.end());
  out_.insert(out_.end(), data.begin(), data.end());
}

void Negotiation::reply_text(OptionReply type, std::string_view text) {
  reply(type, std::as_bytes(std::span(text.substr(0, wire::kMaxString))));
}

// To who cannot begin it, TLS must not be named.
void Negotiation::reply_tls_needed(std::string_view text) {
  reply_text(fixed_ ? OptionReply::kErrTlsReqd : OptionReply::kErrPolicy, text);
}

bool Negotiation::send() {
  const bool sent = stream_.send_all(out_, cancel_, deadline_);
  out_.clear();
  return sent;
}

// The one option whose refusal cannot be told: the session ends instead.
Negotiation::Next Negotiation::export_name(Data data) {
  if (agreed_.extended()) return end("it used EXPORT_NAME after extended headers");
  std::string_view name;
  try {
    name = wire::check_string(data, "the export name");
  } catch (const base::Error&) {
    return end("it sent a bad name");
  }
  auto found = exports_.find(name);
  if (!found || !may_use(*found)) {
    return end("it asked for an export that does not exist, or that it may not use");
  }
  if (!sit_down(found.shared())) return end("the export has as many clients as it may have");
  if (!enter(found)) return end("the export cannot be used any more, or no clone could be made");
  choose(std::move(found));
  const auto answer = wire::encode_export_name_reply(
      agreed_.target->size(), agreed_.target.transmission_flags(agreed_.headers));
  const size_t length = no_zeroes_ ? wire::kExportNameReplyShort : answer.size();
  out_.insert(out_.end(), answer.begin(), answer.begin() + static_cast<ptrdiff_t>(length));
  return Next::kTransmission;
}

Negotiation::Next Negotiation::abort(Data) {
  reply(OptionReply::kAck);
  return end("it ended the handshake");
}

Negotiation::Next Negotiation::list(Data data) {
  if (!data.empty()) throw base::Error(EINVAL, "LIST takes no data");
  for (const auto& each : exports_.all()) {
    if (!may_use(*each)) continue;
    std::vector<std::byte> entry(4);
    base::store_be(entry.data(), static_cast<uint32_t>(each->name().size()));
    for (const std::string& text : {each->name(), each->description()}) {
      const auto bytes = std::as_bytes(std::span(text));
      entry.insert(entry.end(), bytes.begin(), bytes.end());
    }
    reply(OptionReply::kServer, entry);
  }
  reply(OptionReply::kAck);
  return Next::kOption;
}

// Makes the client one of the export's, with a disk of its own where each gets one. False: it
// cannot be, and where that is not because the export is being withdrawn the log says why.
bool Negotiation::enter(ExportUse& use) {
  if (!chosen_(use.shared())) {
    (void)chosen_(nullptr);
    return false;
  }
  try {
    use.open_clone();
    return true;
  } catch (const std::exception& e) {
    (void)chosen_(nullptr);
    base::log_warning("NBD export '{}': no clone could be made: {}", use.name(), e.what());
    return false;
  }
}

// Empty: there is no such export, and the client has been told.
ExportUse Negotiation::describe_export(Data data, Purpose purpose) {
  const wire::InfoRequest request = wire::decode_info_request(data);
  ExportUse found = find(request.name);
  if (!found) return {};
  if (purpose == Purpose::kUse && !sit_down(found.shared())) {
    reply_text(OptionReply::kErrPolicy, "the export has as many clients as it may have");
    return {};
  }
  if (purpose == Purpose::kUse && !enter(found)) {
    agreed_.seat = {};
    reply_text(OptionReply::kErrUnknown,
               "the export cannot be used any more, or no clone could be made; the server's log "
               "says why");
    return {};
  }
  reply(OptionReply::kInfo,
        wire::encode_info_export(found->size(), found.transmission_flags(agreed_.headers)));
  const auto text_info = [this](wire::Info type, const std::string& text) {
    std::vector<std::byte> out(2);
    base::store_be(out.data(), static_cast<uint16_t>(type));
    const auto bytes = std::as_bytes(std::span(text));
    out.insert(out.end(), bytes.begin(), bytes.end());
    reply(OptionReply::kInfo, out);
  };
  const auto wants = [&request](wire::Info type) {
    return request.wants(static_cast<uint16_t>(type));
  };
  if (wants(wire::Info::kName)) text_info(wire::Info::kName, found.name());
  if (wants(wire::Info::kDescription) && !found->description().empty()) {
    text_info(wire::Info::kDescription, found->description());
  }
  if (wants(wire::Info::kBlockSize)) {
    // Any alignment is served: the graph pads what a node cannot take as it is.
    reply(OptionReply::kInfo,
          wire::encode_info_block_size(1, found->preferred_block(), wire::kMaxPayload));
  }
  reply(OptionReply::kAck);
  return found;
}

bool Negotiation::sit_down(const std::shared_ptr<Export>& target) {
  agreed_.seat = ExportSeat(target);
  return static_cast<bool>(agreed_.seat);
}

Negotiation::Next Negotiation::info(Data data) {
  (void)describe_export(data, Purpose::kInfo);
  return Next::kOption;
}

Negotiation::Next Negotiation::go(Data data) {
  ExportUse found = describe_export(data, Purpose::kUse);
  if (!found) return Next::kOption;
  choose(std::move(found));
  return Next::kTransmission;
}

void Negotiation::choose(ExportUse chosen) {
  // Contexts are selected for one export; for another they mean nothing.
  if (contexts_for_ != chosen.name()) agreed_.contexts.clear();
  agreed_.target = std::move(chosen);
}

Negotiation::Next Negotiation::structured_reply(Data data) {
  if (!data.empty()) throw base::Error(EINVAL, "STRUCTURED_REPLY takes no data");
  if (agreed_.extended()) {
    reply_text(OptionReply::kErrExtHeaderReqd, "extended headers were negotiated already");
    return Next::kOption;
  }
  agreed_.headers = wire::Headers::kStructured;
  reply(OptionReply::kAck);
  return Next::kOption;
}

Negotiation::Next Negotiation::extended_headers(Data data) {
  if (!data.empty()) throw base::Error(EINVAL, "EXTENDED_HEADERS takes no data");
  agreed_.headers = wire::Headers::kExtended;
  reply(OptionReply::kAck);
  return Next::kOption;
}

void Negotiation::describe_context(const MetaContext& context, uint32_t id) {
  std::vector<std::byte> entry(4);
  base::store_be(entry.data(), id);
  const auto name = std::as_bytes(std::span(context.name));
  entry.insert(entry.end(), name.begin(), name.end());
  reply(OptionReply::kMetaContext, entry);
}

// A clone begins without bitmaps.
std::vector<MetaContext> Negotiation::contexts_of(const ExportUse& use) {
  std::vector<MetaContext> out = meta_contexts(use->handle());
  std::erase_if(out, [&](const MetaContext& each) { return !use->offers(each.name); });
  if (use->cloned()) std::erase_if(out, [](const auto& each) { return !each.bitmap.empty(); });
  return out;
}

Negotiation::Next Negotiation::list_meta_context(Data data) {
  if (!agreed_.structured()) throw base::Error(EINVAL, "negotiate structured replies first");
  const wire::MetaContextRequest request = wire::decode_meta_context_request(data);
  const auto found = find(request.name);
  if (!found) return Next::kOption;
  for (const MetaContext& each : contexts_of(found)) {
    const bool wanted = std::any_of(request.queries.begin(), request.queries.end(),
                                    [&](auto query) { return is_listed_by(each, query); });
    if (wanted || request.queries.empty()) describe_context(each, 0);
  }
  reply(OptionReply::kAck);
  return Next::kOption;
}

void Negotiation::forget_contexts() noexcept {
  agreed_.contexts.clear();
  contexts_for_.reset();
}

Negotiation::Next Negotiation::set_meta_context(Data data) {
  // Whatever was selected before is gone, also when this fails.
  forget_contexts();
  if (!agreed_.structured()) throw base::Error(EINVAL, "negotiate structured replies first");
  const wire::MetaContextRequest request = wire::decode_meta_context_request(data);
  const auto found = find(request.name);
  if (!found) return Next::kOption;
  std::vector<MetaContext> selected = contexts_of(found);
  std::erase_if(selected, [&](const MetaContext& each) {
    return std::find(request.queries.begin(), request.queries.end(), each.name) ==
           request.queries.end();
  });
  if (selected.size() > kMostContexts) {
    reply_text(OptionReply::kErrTooBig,
               fmt::format("at most {} contexts can be selected", kMostContexts));
    return Next::kOption;
  }
  agreed_.contexts = std::move(selected);
  contexts_for_ = found.name();
  for (const MetaContext& each : agreed_.contexts) describe_context(each, each.id);
  reply(OptionReply::kAck);
  return Next::kOption;
}

}  // namespace minivmm::nbd
