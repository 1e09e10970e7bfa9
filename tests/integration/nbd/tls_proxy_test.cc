// SPDX-License-Identifier: Apache-2.0
// `minivmm nbd connect` to a server with TLS, without the kernel: the test has the sockets that the
// kernel's driver would get, and talks NBD's transmission phase through them.
#include <sys/socket.h>
#include <sys/wait.h>

#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <thread>

#include "base/bytes.h"
#include "base/error.h"
#include "base/nbd_uri.h"
#include "cli/nbd_device.h"
#include "cli/nbd_tls_proxy.h"
#include "tests/support/process.h"
#include "tls_files.h"

namespace minivmm::nbd {
namespace {

using Bytes = std::vector<std::byte>;
constexpr size_t kMiB = 1 << 20;

enum Type : uint16_t { kRead = 0, kWrite = 1, kDisc = 2, kFlush = 3 };

Bytes noise(size_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes out(size);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t v = random();
    std::memcpy(out.data() + i, &v, 8);
  }
  return out;
}

// As the kernel's driver uses its socket. Blocking.
class Driver {
 public:
  explicit Driver(base::UniqueFd socket) : socket_(std::move(socket)) {
    // A test that waits for something that does not come fails.
    const timeval limit{.tv_sec = 60, .tv_usec = 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  }

  bool send(const std::byte* data, size_t size) {
    while (size > 0) {
      const ssize_t n = ::send(socket_.get(), data, size, MSG_NOSIGNAL);
      if (n <= 0) return false;
      data += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  bool ask(Type type, uint64_t cookie, uint64_t offset, uint32_t length) {
    std::byte head[28];
    base::store_be(head, uint32_t{0x25609513});
    base::store_be(head + 4, uint16_t{0});
    base::store_be(head + 6, static_cast<uint16_t>(type));
    base::store_be(head + 8, cookie);
    base::store_be(head + 16, offset);
    base::store_be(head + 24, length);
    return send(head, sizeof head);
  }
  bool receive(std::byte* to, size_t size) {
    while (size > 0) {
      const ssize_t n = ::recv(socket_.get(), to, size, 0);
      if (n <= 0) return false;
      to += n;
      size -= static_cast<size_t>(n);
    }
    return true;
  }
  // Of a simple reply without an error: its cookie.
  std::optional<uint64_t> reply() {
    std::byte head[16];
    if (!receive(head, sizeof head)) return std::nullopt;
    EXPECT_EQ(base::load_be<uint32_t>(head), 0x67446698u);
    EXPECT_EQ(base::load_be<uint32_t>(head + 4), 0u);
    return base::load_be<uint64_t>(head + 8);
  }
  Bytes read(uint64_t offset, uint32_t length) {
    Bytes out(length);
    EXPECT_TRUE(ask(kRead, offset, offset, length));
    EXPECT_EQ(reply(), offset);
    EXPECT_TRUE(receive(out.data(), out.size()));
    return out;
  }
  void ask_to_write(uint64_t cookie, uint64_t offset, const Bytes& data) {
    EXPECT_TRUE(ask(kWrite, cookie, offset, static_cast<uint32_t>(data.size())));
    EXPECT_TRUE(send(data.data(), data.size()));
  }
  bool is_at_end() {
    std::byte one;
    return ::recv(socket_.get(), &one, 1, 0) == 0;
  }
  void send_no_more() { ::shutdown(socket_.get(), SHUT_WR); }
  // As the kernel's driver disconnects.
  void disconnect() {
    EXPECT_TRUE(ask(kDisc, 0, 0, 0));
    ::shutdown(socket_.get(), SHUT_RDWR);
    socket_.reset();
  }
  void close() { socket_.reset(); }

 private:
  base::UniqueFd socket_;
};

class TlsProxy : public TlsFiles {
 protected:
  ~TlsProxy() override {
    drivers_.clear();
    if (proxy_) {
      EXPECT_EQ(status_at_end(), 0);
    }
  }

  void serve_with_keys() {
    make_keys();
    serve({"--object=tls-creds-psk,id=tls0,endpoint=server,dir=" + path("keys"),
           "--nbd=nbd+unix:///?socket=" + path("tls.sock") + ",tls-creds=tls0"});
  }
  std::string key_uri(const std::string& name, const std::string& keys = "keys") const {
    return "nbds+unix://alice@/" + name + "?socket=" + path("tls.sock") +
           "&tls-psk-file=" + path(keys + "/keys.psk");
  }
  // Where a server with certificates listens: "nbds://127.0.0.1:PORT/disk".
  std::string serve_with_certificates() {
    make_certificates("pki", "/O=Example/CN=carol");
    serve({"--object=tls-creds-x509,id=tls0,endpoint=server,dir=" + path("pki"),
           "--nbd=nbd://127.0.0.1:0,tls-creds=tls0"});
    const std::vector<std::string> found = tcp_uris("disk", "nbds://127.");
    return found.empty() ? "" : found[0];
  }

  void attach(const std::string& uri, uint64_t connections = 1) {
    std::vector<cli::NbdAttachment> attached =
        cli::attach_all_to_nbd(base::parse_nbd_uri(uri), connections);
    EXPECT_EQ(attached[0].size, kSize);
    proxy_ = cli::start_nbd_tls_proxy(attached, /*keeps_errors=*/true);
    ASSERT_TRUE(proxy_);
    for (cli::NbdAttachment& each : attached) {
      EXPECT_FALSE(each.tls);
      drivers_.push_back(std::make_unique<Driver>(std::move(each.socket)));
    }
  }
  static std::string error_of(const std::string& uri) {
    try {
      (void)cli::attach_all_to_nbd(base::parse_nbd_uri(uri), 1);
    } catch (const base::Error& e) {
      return e.what();
    }
    return "no error";
  }
  // The proxy's; -1: it is still there after a minute.
  int status_at_end() {
    for (int i = 0; i < 6000; ++i) {
      int status = 0;
      if (::waitpid(*proxy_, &status, WNOHANG) == *proxy_) {
        proxy_.reset();
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return -1;
  }
  uint64_t proxy_anonymous_kib() const {
    std::ifstream file("/proc/" + std::to_string(*proxy_) + "/status");
    for (std::string word; file >> word;) {
      uint64_t value = 0;
      if (word == "RssAnon:" && file >> value) return value;
    }
    return 0;
  }
  Bytes disk_bytes(uint64_t offset, size_t size) const {
    Bytes out(size);
    std::ifstream file(path("disk.raw"), std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(size));
    return out;
  }
  Driver& driver(size_t i) { return *drivers_.at(i); }

  std::vector<std::unique_ptr<Driver>> drivers_;
  std::optional<pid_t> proxy_;
};

TEST_F(TlsProxy, LargeRequestsGoBothWaysOverTwoConnections) {
  serve_with_keys();
  attach(key_uri("mem"), 2);
  constexpr size_t kPiece = 4 * kMiB;
  std::map<uint64_t, Bytes> written;
  // All of them before a reply is looked at.
  for (uint64_t at = 0; at < kSize; at += kPiece) {
    written[at] = noise(kPiece, at);
    driver(at / kPiece % 2).ask_to_write(at, at, written[at]);
  }
  size_t replies = 0;
  for (; replies < written.size(); ++replies) ASSERT_TRUE(driver(replies % 2).reply());
  ASSERT_TRUE(driver(0).ask(kFlush, 1, 0, 0));
  EXPECT_EQ(driver(0).reply(), 1u);
  for (const auto& [at, data] : written) {
    EXPECT_EQ(driver(1 - at / kPiece % 2).read(at, kPiece), data) << at;
  }
  driver(0).disconnect();
  driver(1).disconnect();
  EXPECT_EQ(status_at_end(), 0);
}

TEST_F(TlsProxy, ManySmallRequestsAreInFlight) {
  serve_with_keys();
  attach(key_uri("disk"));
  constexpr uint32_t kPiece = 4096;
  for (int turn = 0; turn < 8; ++turn) {
    for (uint64_t i = 0; i < 128; ++i) ASSERT_TRUE(driver(0).ask(kRead, i, i * kPiece, kPiece));
    std::map<uint64_t, Bytes> got;
    for (int i = 0; i < 128; ++i) {
      const auto cookie = driver(0).reply();
      ASSERT_TRUE(cookie);
      got[*cookie].resize(kPiece);
      ASSERT_TRUE(driver(0).receive(got[*cookie].data(), kPiece));
    }
    ASSERT_EQ(got.size(), 128u);
    for (const auto& [cookie, data] : got) EXPECT_EQ(data, disk_bytes(cookie * kPiece, kPiece));
  }
}

// The server has much to say to somebody who does not listen, and that lies with the server.
TEST_F(TlsProxy, WhoDoesNotReadIsNotReadFor) {
  serve_with_keys();
  attach(key_uri("mem"));
  constexpr uint32_t kPiece = 4 * kMiB;
  const Bytes data = noise(kPiece, 3);
  driver(0).ask_to_write(0, 0, data);
  ASSERT_TRUE(driver(0).reply());
  constexpr uint64_t kRequests = 64;
  const uint64_t before = proxy_anonymous_kib();
  for (uint64_t i = 0; i < kRequests; ++i) ASSERT_TRUE(driver(0).ask(kRead, i, 0, kPiece));
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  if (kMemoryIsOurs) {
    EXPECT_LT(proxy_anonymous_kib(), before + 4096);
  }
  for (uint64_t i = 0; i < kRequests; ++i) {
    Bytes got(kPiece);
    ASSERT_TRUE(driver(0).reply());
    ASSERT_TRUE(driver(0).receive(got.data(), got.size()));
    ASSERT_EQ(got, data);
  }
}

TEST_F(TlsProxy, WhoSendsNoMoreGetsTheReplies) {
  serve_with_keys();
  attach(key_uri("disk"));
  constexpr uint32_t kPiece = kMiB;
  for (uint64_t i = 0; i < 8; ++i) ASSERT_TRUE(driver(0).ask(kRead, i, 0, kPiece));
  ASSERT_TRUE(driver(0).ask(kDisc, 0, 0, 0));
  driver(0).send_no_more();
  const Bytes expected = disk_bytes(0, kPiece);
  for (uint64_t i = 0; i < 8; ++i) {
    Bytes got(kPiece);
    ASSERT_TRUE(driver(0).reply());
    ASSERT_TRUE(driver(0).receive(got.data(), got.size()));
    EXPECT_EQ(got, expected);
  }
  EXPECT_TRUE(driver(0).is_at_end());
  EXPECT_EQ(status_at_end(), 0);
}

// One connection ends in the middle of what it writes; the other does not notice.
TEST_F(TlsProxy, AConnectionThatBreaksOffIsAlone) {
  serve_with_keys();
  attach(key_uri("mem"), 2);
  const Bytes data = noise(4 * kMiB, 5);
  ASSERT_TRUE(driver(0).ask(kWrite, 1, 0, static_cast<uint32_t>(data.size())));
  ASSERT_TRUE(driver(0).send(data.data(), data.size() / 2));
  driver(0).close();
  driver(1).ask_to_write(2, 8 * kMiB, data);
  EXPECT_EQ(driver(1).reply(), 2u);
  EXPECT_EQ(driver(1).read(8 * kMiB, 4 * kMiB), data);
  // Nor does one that leaves with replies on their way.
  ASSERT_TRUE(driver(1).ask(kRead, 3, 0, 32 * kMiB));
  driver(1).close();
  EXPECT_EQ(status_at_end(), 0);
}

TEST_F(TlsProxy, AServerThatIsKilledEndsIt) {
  serve_with_keys();
  attach(key_uri("mem"), 2);
  const Bytes data = noise(4 * kMiB, 5);
  driver(0).ask_to_write(1, 0, data);
  EXPECT_EQ(driver(0).reply(), 1u);
  server_->signal(SIGKILL);
  (void)server_->wait(10);
  server_.reset();
  EXPECT_TRUE(driver(0).is_at_end());
  // The kernel's driver may find out while it sends.
  while (driver(1).ask(kFlush, 1, 0, 0)) {
  }
  EXPECT_EQ(status_at_end(), 0);
}

// The device is disconnected while its server does nothing: nobody stays behind to wait for it.
TEST_F(TlsProxy, AServerThatHangsDoesNotKeepIt) {
  serve_with_keys();
  attach(key_uri("mem"), 2);
  server_->signal(SIGSTOP);
  ASSERT_TRUE(driver(0).ask(kRead, 1, 0, kMiB));
  // The first piece is taken whole by sockets, the rest is stuck in front of the server.
  const Bytes data = noise(64 << 10, 5);
  std::thread writer([&] {
    (void)driver(1).ask(kWrite, 1, 0, static_cast<uint32_t>(16 * kMiB));
    while (driver(1).send(data.data(), data.size())) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  driver(0).disconnect();
  driver(1).send_no_more();
  writer.join();
  driver(1).close();
  EXPECT_EQ(status_at_end(), 0);
  server_->signal(SIGCONT);
}

TEST_F(TlsProxy, CertificatesAreShownAndChecked) {
  SKIP_WITHOUT("openssl");
  const std::string at = serve_with_certificates();
  ASSERT_FALSE(at.empty());
  make_certificates("other", "/O=Example/CN=carol");
  attach(at + "?tls-certificates=" + path("pki"));
  EXPECT_EQ(driver(0).read(0, kMiB), disk_bytes(0, kMiB));
  driver(0).disconnect();
  EXPECT_EQ(status_at_end(), 0);

  // Another authority's server; the right one's for another host.
  expect_in(error_of(at + "?tls-certificates=" + path("other")), "certificate");
  expect_in(error_of(at + "?tls-certificates=" + path("pki") + "&tls-hostname=elsewhere"),
            "does not match");
  // A client of another authority, and one without a certificate.
  for (const char* const file : {"/ca-cert.pem"}) {
    std::filesystem::copy_file(path("pki") + file, path("other") + file,
                               std::filesystem::copy_options::overwrite_existing);
  }
  expect_in(error_of(at + "?tls-certificates=" + path("other")), "TLS: ");
  std::filesystem::remove(path("other/client-cert.pem"));
  expect_in(error_of(at + "?tls-certificates=" + path("other")), "TLS: ");
  expect_in(error_of(at + "?tls-certificates=" + path("nosuch")), "no such file");
  // Without TLS nothing is said in the clear.
  std::string plain = at;
  plain.erase(3, 1);
  expect_in(error_of(plain), "--tls-creds");
}

TEST_F(TlsProxy, KeysAreChecked) {
  serve_with_keys();
  expect_in(error_of(key_uri("disk", "wrong")), "TLS: ");
  std::string unknown = key_uri("disk");
  unknown.replace(unknown.find("alice"), 5, "nobody");
  expect_in(error_of(unknown), "holds no key for 'nobody'");
  expect_in(error_of(key_uri("nosuch")), "no export 'nosuch'");
  std::string none = key_uri("disk");
  none.replace(none.find("tls.sock"), 8, "m.sock");
  expect_in(error_of(none), "does no TLS");
}

}  // namespace
}  // namespace minivmm::nbd
