// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/tls_session.h"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "nbd-server/tls_handles.h"

namespace minivmm::nbd {
namespace {

// The most data of one record.
constexpr size_t kRecord = size_t{16} << 10;
// So much data is encrypted for one send, or a record where the socket is nearly full: what it does
// not take is kept, and a client that does not read shall not cost much.
constexpr size_t kBatch = 4 * kRecord;
// So many messages without data in a row are nobody's who wants something.
constexpr unsigned kMostEmpty = 1000;

bool again(ssize_t status) noexcept {
  return status == GNUTLS_E_AGAIN || status == GNUTLS_E_INTERRUPTED ||
         status == GNUTLS_E_WARNING_ALERT_RECEIVED;
}

// Goes through buffers record by record. What lies together is encrypted from where it lies.
class Records {
 public:
  explicit Records(std::span<const iovec> from) noexcept : from_(from) {}

  // The next at most `limit` bytes; empty at the end. Valid until the next call.
  std::span<const std::byte> next(size_t limit) noexcept {
    skip_empty();
    if (from_.empty()) return {};
    const size_t here = from_.front().iov_len - at_;
    const auto* const data = static_cast<const std::byte*>(from_.front().iov_base) + at_;
    if (here >= limit || from_.size() == 1) {
      const size_t size = std::min(here, limit);
      at_ += size;
      return {data, size};
    }
    return gather(limit);
  }

 private:
  void skip_empty() noexcept {
    while (!from_.empty() && at_ == from_.front().iov_len) {
      from_ = from_.subspan(1);
      at_ = 0;
    }
  }
  std::span<const std::byte> gather(size_t limit) noexcept {
    // Not in the thread's own storage, of which every thread of the process would have this much.
    thread_local const auto record = std::make_unique_for_overwrite<std::byte[]>(kRecord);
    size_t size = 0;
    for (; size < limit && !from_.empty(); skip_empty()) {
      const size_t n = std::min(from_.front().iov_len - at_, limit - size);
      std::memcpy(record.get() + size, static_cast<const std::byte*>(from_.front().iov_base) + at_,
                  n);
      size += n;
      at_ += n;
    }
    return {record.get(), size};
  }

  std::span<const iovec> from_;
  size_t at_ = 0;  // in the first
};

}  // namespace

void TlsSession::Closer::operator()(gnutls_session_int* session) const noexcept {
  gnutls_api().deinit(session);
}

TlsSession::TlsSession(std::shared_ptr<const TlsCredentials> credentials, int socket)
    : credentials_(std::move(credentials)), transport_(socket) {
  const GnutlsApi& api = gnutls_api();
  gnutls_session_t session = nullptr;
  const unsigned end = credentials_->is_client_ ? GNUTLS_CLIENT : GNUTLS_SERVER;
  require_tls(api.init(&session, end | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL), "a session");
  session_.reset(session);
  require_tls(api.priority_set(session, credentials_->handles_->priority), "priority");
  choose_credentials();
  transport_.attach(session);
}

// Keys where there are some, or else certificates.
void TlsSession::choose_credentials() {
  const GnutlsApi& api = gnutls_api();
  const TlsCredentials::Handles& handles = *credentials_->handles_;
  const bool client = credentials_->is_client_;
  if (void* const keys = client ? static_cast<void*>(handles.key) : handles.keys) {
    require_tls(api.credentials_set(session_.get(), GNUTLS_CRD_PSK, keys), "keys");
    return;
  }
  require_tls(api.credentials_set(session_.get(), GNUTLS_CRD_CERTIFICATE, handles.certificates),
              "certificates");
  client ? check_server() : check_client();
}

void TlsSession::check_client() {
  const GnutlsApi& api = gnutls_api();
  if (!credentials_->options_.verify_peer) return;
  api.certificate_server_set_request(session_.get(), GNUTLS_CERT_REQUIRE);
  api.session_set_verify_cert(session_.get(), nullptr, 0);
}

void TlsSession::check_server() {
  const GnutlsApi& api = gnutls_api();
  const std::string& host = credentials_->host_;
  in6_addr address{};
  const bool is_address = ::inet_pton(AF_INET, host.c_str(), &address) == 1 ||
                          ::inet_pton(AF_INET6, host.c_str(), &address) == 1;
  if (!host.empty() && !is_address) {
    require_tls(api.server_name_set(session_.get(), GNUTLS_NAME_DNS, host.data(), host.size()),
                "the server's name");
  }
  // The text is used during the handshake; the credentials, which have it, outlive the session.
  if (credentials_->options_.verify_peer) {
    api.session_set_verify_cert(session_.get(), host.empty() ? nullptr : host.c_str(), 0);
  }
}

TlsSession::~TlsSession() = default;

TlsSession::Step TlsSession::handshake() {
  const GnutlsApi& api = gnutls_api();
  // All that is there: where this ends badly, a socket with unread data would be reset, and the
  // client would not get to read why.
  TlsTransport::Receiving turn(transport_);
  turn.want(kBatch);
  for (;;) {
    const int status = api.handshake(session_.get());
    if (status == GNUTLS_E_SUCCESS) {
      transport_.keep();
      return Step::kDone;
    }
    if (status == GNUTLS_E_AGAIN) {
      return api.record_get_direction(session_.get()) == 0 ? Step::kWantsRead : Step::kWantsWrite;
    }
    // A warning of the peer's, or a signal: it goes on.
    if (again(status)) continue;
    std::string text = why(status);
    // Where there is no room for the alert, the end of the connection has to do.
    (void)api.alert_send_appropriate(session_.get(), status);
    throw base::Error(EACCES, "TLS: " + std::move(text));
  }
}

std::string TlsSession::trouble() const { return trouble_ < 0 ? "TLS: " + why(trouble_) : ""; }

std::string TlsSession::why(int status) const {
  const GnutlsApi& api = gnutls_api();
  std::string out = api.strerror(status);
  if (status == GNUTLS_E_FATAL_ALERT_RECEIVED) {
    const char* const name = api.alert_get_name(api.alert_get(session_.get()));
    if (name != nullptr) out += fmt::format(" It says: {}.", name);
  }
  if (status == GNUTLS_E_CERTIFICATE_ERROR || status == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
    gnutls_datum_t text{};
    const unsigned problems = api.session_get_verify_cert_status(session_.get());
    if (api.certificate_verification_status_print(problems, GNUTLS_CRT_X509, &text, 0) >= 0) {
      out += fmt::format(" {}", std::string_view(reinterpret_cast<char*>(text.data), text.size));
      (*api.free)(text.data);
    }
  }
  return out;
}

std::string TlsSession::peer_name() const {
  const GnutlsApi& api = gnutls_api();
  if (credentials_->handles_->keys != nullptr) {
    const char* const user = api.psk_server_get_username(session_.get());
    return user != nullptr ? user : "";
  }
  unsigned count = 0;
  const gnutls_datum_t* const list = api.certificate_get_peers(session_.get(), &count);
  // One that was not asked for proves nothing.
  if (list == nullptr || count == 0 || !credentials_->options_.verify_peer) return {};
  gnutls_x509_crt_t certificate = nullptr;
  require_tls(api.x509_crt_init(&certificate), "the client's certificate");
  char name[1024];
  size_t size = sizeof name;
  int status = api.x509_crt_import(certificate, &list[0], GNUTLS_X509_FMT_DER);
  if (status >= 0) status = api.x509_crt_get_dn(certificate, name, &size);
  api.x509_crt_deinit(certificate);
  require_tls(status, "the name in the client's certificate");
  return {name, size};
}

int64_t TlsSession::try_receive(std::span<const iovec> to) noexcept {
  size_t room = 0;
  for (const iovec& part : to) room += part.iov_len;
  TlsTransport::Receiving turn(transport_);
  int64_t received = 0;
  unsigned empty = 0;
  for (const iovec& part : to) {
    for (size_t at = 0; at < part.iov_len;) {
      turn.want(room - static_cast<size_t>(received));
      const ssize_t n = gnutls_api().record_recv(
          session_.get(), static_cast<std::byte*>(part.iov_base) + at, part.iov_len - at);
      if (n > 0) {
        at += static_cast<size_t>(n);
        received += n;
        continue;
      }
      // A message of TLS's own. What came behind it is here, and the socket will not tell of it.
      if (again(n) && transport_.has_input()) {
        if (++empty < kMostEmpty) continue;
        if (received == 0) return -EPROTO;
      }
      // What came before an error is taken first; the next call finds it again.
      if (received > 0) return received;
      if (again(n)) return -EAGAIN;
      trouble_ = static_cast<int>(n);
      return n == 0 || n == GNUTLS_E_PREMATURE_TERMINATION ? 0 : -EPROTO;
    }
  }
  return received;
}

// Returns how much of `from` is in records now.
int64_t TlsSession::encrypt(std::span<const iovec> from) noexcept {
  Records records(from);
  size_t done = 0;
  size_t most = kRecord;
  for (;;) {
    if (done == kRecord && transport_.has_room()) most = kBatch;
    if (done == most) break;
    std::span<const std::byte> data = records.next(std::min(kRecord, most - done));
    if (data.empty()) break;
    // The client may have asked for smaller records.
    while (!data.empty()) {
      const ssize_t n = gnutls_api().record_send(session_.get(), data.data(), data.size());
      if (n <= 0) return -EPIPE;
      done += static_cast<size_t>(n);
      data = data.subspan(static_cast<size_t>(n));
    }
  }
  return static_cast<int64_t>(done);
}

int64_t TlsSession::try_send(std::span<const iovec> from) noexcept {
  if (transport_.pending()) {
    if (const int status = transport_.flush(); status < 0) return status;
  }
  if (stuck_ > 0) return static_cast<int64_t>(std::exchange(stuck_, 0));
  transport_.begin();
  const int64_t taken = encrypt(from);
  const int status = transport_.end();
  if (taken < 0) return taken;
  if (status == -EAGAIN) stuck_ = static_cast<size_t>(taken);
  return status < 0 ? status : taken;
}

void TlsSession::bye() noexcept {
  if (!transport_.pending()) (void)gnutls_api().bye(session_.get(), GNUTLS_SHUT_WR);
}

}  // namespace minivmm::nbd
