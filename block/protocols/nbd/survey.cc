// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/survey.h"

#include <string_view>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>

#include <fmt/core.h>

#include "base/error.h"
#include "block/protocols/nbd/libnbd.h"
#include "block/protocols/nbd/tls_setup.h"

namespace minivmm::block {
namespace {

using base::Error;
using base::NbdUri;

// A server may list without end: of what it tells so much is kept, in bytes.
constexpr size_t kMostKept = size_t{16} << 20;
// What a text and an export cost beside their characters.
constexpr size_t kTextCost = 64;
constexpr size_t kExportCost = 512;

// A blocking connection whose handshake goes step by step.
class Talk {
 public:
  explicit Talk(const NbdUri& uri) : nbd_(libnbd()), uri_(uri), handle_(nbd_.create()) {
    if (handle_ == nullptr) fail();
    if (uri_.host.empty() && !uri_.is_unix() && !uri_.is_vsock()) uri_.host = "localhost";
    check(nbd_.set_opt_mode(handle_, true));
    check(nbd_.set_full_info(handle_, true));
    // The URI is the user's own word.
    check(nbd_.set_uri_allow_local_file(handle_, true));
    if (!set_up_tls(nbd_, handle_, uri_)) fail();
    check(nbd_.connect_uri(handle_, uri_.text().c_str()));
    socket_ = check(nbd_.aio_get_fd(handle_));
  }
  ~Talk() { nbd_.close(handle_); }
  Talk(const Talk&) = delete;
  Talk& operator=(const Talk&) = delete;

  const Libnbd& nbd() const noexcept { return nbd_; }
  nbd_handle* handle() const noexcept { return handle_; }
  const NbdUri& uri() const noexcept { return uri_; }
  // Of a call that gives -1 where it failed.
  template <typename T>
  T check(T result) const {
    if (result == -1) fail();
    return result;
  }
  std::string text(char* given) const {
    if (given == nullptr) return {};
    const std::unique_ptr<char, decltype(&::free)> owned(given, &::free);
    return owned.get();
  }

  // Before something is kept that the server has told. False: it is too much by now, and the
  // conversation is over. From libnbd's callbacks, too, which cannot end it in another way.
  bool keep(size_t bytes) noexcept {
    too_much_ = too_much_ || bytes > kMostKept - kept_;
    if (too_much_) {
      ::shutdown(socket_, SHUT_RDWR);
    } else {
      kept_ += bytes;
    }
    return !too_much_;
  }
  void require_enough() const {
    if (!too_much_) return;
    throw Error(E2BIG, fmt::format("{}: the server tells too much: more than {} MiB of names, "
                                   "descriptions and contexts",
                                   uri_.text(), kMostKept >> 20));
  }

 private:
  [[noreturn]] void fail() const {
    require_enough();
    const int err = nbd_.get_errno();
    const char* const why = nbd_.get_error();
    throw Error(err != 0 ? err : EIO,
                fmt::format("{}: {}", uri_.text(), why != nullptr ? why : "no answer"));
  }

  const Libnbd& nbd_;
  NbdUri uri_;
  nbd_handle* const handle_;
  int socket_ = -1;  // libnbd's
  size_t kept_ = 0;
  bool too_much_ = false;
};

using Names = std::vector<std::pair<std::string, std::string>>;

// What a callback fills.
template <typename List>
struct Filling {
  Talk& talk;
  List& list;
};

int add_name(void* names, const char* name, const char* description) noexcept {
  const auto& filling = *static_cast<Filling<Names>*>(names);
  if (filling.talk.keep(std::strlen(name) + std::strlen(description) + 2 * kTextCost)) {
    filling.list.emplace_back(name, description);
  }
  return 0;
}

using Contexts = std::vector<std::string>;

int add_context(void* contexts, const char* name) noexcept {
  const auto& filling = *static_cast<Filling<Contexts>*>(contexts);
  if (filling.talk.keep(std::strlen(name) + kTextCost)) filling.list.emplace_back(name);
  return 0;
}

// Of before 2012: it has one export, told at once, and no options.
bool is_oldstyle(const Talk& talk) {
  return std::string_view(talk.nbd().get_protocol(talk.handle())) == "oldstyle";
}

Names list_names(Talk& talk) {
  Names names;
  if (is_oldstyle(talk)) {
    throw Error(ENOTSUP,
                fmt::format("{}: the server is of the oldstyle: it has one export, without "
                            "a name, and lists nothing",
                            talk.uri().text()));
  }
  Filling<Names> filling{talk, names};
  talk.check(talk.nbd().opt_list(
      talk.handle(),
      nbd_list_callback{.callback = &add_name, .user_data = &filling, .free = nullptr}));
  talk.require_enough();
  return names;
}

NbdExportSurvey survey_export(Talk& talk) {
  const Libnbd& nbd = talk.nbd();
  nbd_handle* const h = talk.handle();
  NbdExportSurvey out;
  // Before the contexts: a server of the older kind has neither.
  if (!is_oldstyle(talk)) talk.check(nbd.opt_info(h));
  out.size = static_cast<uint64_t>(talk.check(nbd.get_size(h)));
  out.name = talk.text(nbd.get_canonical_export_name(h));
  if (out.name.empty()) out.name = talk.uri().export_name;
  out.description = talk.text(nbd.get_export_description(h));
  NbdUri uri = talk.uri();
  uri.export_name = out.name;
  out.uri = uri.text();
  (void)talk.keep(out.name.size() + out.description.size() + out.uri.size() + kExportCost);
  talk.require_enough();
  const struct {
    const char* name;
    decltype(Libnbd::can_fua) ask;
  } abilities[] = {
      {"is_rotational", nbd.is_rotational},
      {"is_read_only", nbd.is_read_only},
      {"can_cache", nbd.can_cache},
      {"can_df", nbd.can_df},
      {"can_fast_zero", nbd.can_fast_zero},
      {"can_flush", nbd.can_flush},
      {"can_fua", nbd.can_fua},
      {"can_multi_conn", nbd.can_multi_conn},
      {"can_trim", nbd.can_trim},
      {"can_zero", nbd.can_zero},
  };
  for (const auto& each : abilities) out.abilities.emplace_back(each.name, each.ask(h) == 1);
  const auto block = [&](int which) {
    return static_cast<uint64_t>(std::max<int64_t>(nbd.get_block_size(h, which), 0));
  };
  out.minimum_block = block(LIBNBD_SIZE_MINIMUM);
  out.preferred_block = block(LIBNBD_SIZE_PREFERRED);
  out.maximum_block = block(LIBNBD_SIZE_MAXIMUM);
  if (nbd.get_structured_replies_negotiated(h) == 1) {
    Filling<Contexts> filling{talk, out.contexts};
    (void)nbd.opt_list_meta_context(
        h, nbd_context_callback{.callback = &add_context, .user_data = &filling, .free = nullptr});
    talk.require_enough();
  }
  return out;
}

// Puts together what the server tells in pieces.
class Mapper {
 public:
  Mapper(uint64_t size, const std::function<void(const NbdExtent&)>& take)
      : size_(size), take_(take) {}

  uint64_t at() const noexcept { return at_; }
  static int on_extents(void* user, const char*, uint64_t offset, uint32_t* entries, size_t count,
                        int*) noexcept {
    auto& self = *static_cast<Mapper*>(user);
    if (offset != self.at_) return 0;
    try {
      for (size_t i = 0; i + 1 < count; i += 2) self.add(entries[i], entries[i + 1]);
      return 0;
    } catch (...) {
      // Not through libnbd.
      self.error_ = std::current_exception();
      return -1;
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }
  void finish() {
    if (last_.length > 0) take_(last_);
  }

 private:
  void add(uint64_t length, uint32_t type) {
    length = std::min(length, size_ - at_);
    if (length == 0) return;
    if (last_.length > 0 && last_.type != type) take_(last_);
    if (last_.length == 0 || last_.type != type) last_ = {at_, 0, type};
    last_.length += length;
    at_ += length;
  }

  const uint64_t size_;
  const std::function<void(const NbdExtent&)>& take_;
  uint64_t at_ = 0;
  NbdExtent last_;
  std::exception_ptr error_;
};

}  // namespace

void map_nbd_export(const NbdUri& uri, const std::string& context,
                    const std::function<void(const NbdExtent&)>& take) {
  // Lengths have 32 bits, and a server answers as far as it likes.
  constexpr uint64_t kMost = uint64_t{1} << 30;
  const Talk talk(uri);
  const Libnbd& nbd = talk.nbd();
  nbd_handle* const h = talk.handle();
  if (!is_oldstyle(talk)) {
    talk.check(nbd.add_meta_context(h, context.c_str()));
    talk.check(nbd.opt_go(h));
  }
  if (nbd.can_meta_context(h, context.c_str()) != 1) {
    throw Error(ENOTSUP,
                fmt::format("the server does not support metadata context \"{}\"", context));
  }
  const auto size = static_cast<uint64_t>(talk.check(nbd.get_size(h)));
  Mapper mapper(size, take);
  while (mapper.at() < size) {
    const uint64_t before = mapper.at();
    const int done = nbd.block_status(h, std::min(kMost, size - before), before,
                                      {&Mapper::on_extents, &mapper, nullptr}, 0);
    mapper.rethrow();
    talk.check(done);
    if (mapper.at() == before) {
      throw Error(EPROTO, fmt::format("{}: the server says nothing of what lies at {}",
                                      talk.uri().text(), before));
    }
  }
  mapper.finish();
}

NbdServerSurvey survey_nbd_server(const NbdUri& uri, bool all) {
  Talk talk(uri);
  const Libnbd& nbd = talk.nbd();
  NbdServerSurvey out;
  out.protocol = nbd.get_protocol(talk.handle());
  out.tls = nbd.get_tls_negotiated(talk.handle()) == 1;
  out.structured = nbd.get_structured_replies_negotiated(talk.handle()) == 1;
  if (!all) {
    out.exports.push_back(survey_export(talk));
    return out;
  }
  for (const auto& [name, description] : list_names(talk)) {
    talk.check(nbd.set_export_name(talk.handle(), name.c_str()));
    try {
      out.exports.push_back(survey_export(talk));
    } catch (const Error&) {
      talk.require_enough();
      // Listed, and not for us: its name is all that there is to tell.
      out.exports.emplace_back().name = name;
    }
    if (out.exports.back().description.empty()) out.exports.back().description = description;
  }
  return out;
}

Names list_nbd_exports(const NbdUri& uri) {
  Talk talk(uri);
  return list_names(talk);
}

}  // namespace minivmm::block
