// SPDX-License-Identifier: Apache-2.0
// A TlsSession and GnuTLS's own client at the other end of a socket: which cipher they agree on,
// and how much of a fiber's stack GnuTLS takes.
#include "nbd-server/tls_session.h"

#include <fcntl.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <semaphore>
#include <thread>
#include <vector>

#include <dlfcn.h>
#include <gtest/gtest.h>

#include "base/event_loop.h"
#include "base/fiber.h"
#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "nbd-server/gnutls.h"

namespace minivmm::nbd {
namespace {

constexpr size_t kData = 300'000;

template <typename Function>
Function* function(const char* name) {
  static void* const library = ::dlopen("libgnutls.so.30", RTLD_NOW);
  return reinterpret_cast<Function*>(::dlsym(library, name));
}
#define GNUTLS(name) (*function<decltype(::gnutls_##name)>("gnutls_" #name))

// Sends kData bytes, asks for new keys, sends and takes as many again, and leaves.
class TlsClient {
 public:
  TlsClient(int socket, const std::string& priority) {
    const GnutlsApi& api = gnutls_api();
    api.init(&session_, GNUTLS_CLIENT | GNUTLS_NO_SIGNAL);
    GNUTLS(priority_set_direct)(session_, priority.c_str(), nullptr);
    GNUTLS(psk_allocate_client_credentials)(&keys_);
    const std::string text(64, 'a');
    const gnutls_datum_t key = {reinterpret_cast<unsigned char*>(const_cast<char*>(text.data())),
                                static_cast<unsigned>(text.size())};
    GNUTLS(psk_set_client_credentials)(keys_, "alice", &key, GNUTLS_PSK_KEY_HEX);
    api.credentials_set(session_, GNUTLS_CRD_PSK, keys_);
    GNUTLS(transport_set_int2)(session_, socket, socket);
  }
  ~TlsClient() {
    gnutls_api().deinit(session_);
    GNUTLS(psk_free_client_credentials)(keys_);
  }
  TlsClient(const TlsClient&) = delete;
  TlsClient& operator=(const TlsClient&) = delete;

  void run() {
    if (!shake_hands()) return;
    cipher = GNUTLS(cipher_get_name)(GNUTLS(cipher_get)(session_));
    send();
    if (GNUTLS(protocol_get_version)(session_) == GNUTLS_TLS1_3) {
      (void)GNUTLS(session_key_update)(session_, GNUTLS_KU_PEER);
    }
    send();
    std::vector<char> data(kData);
    ssize_t n = 1;
    // GNUTLS_E_AGAIN: it was a ticket.
    while (taken < kData && (n > 0 || n == GNUTLS_E_AGAIN)) {
      n = gnutls_api().record_recv(session_, data.data(), data.size());
      if (n > 0) taken += static_cast<size_t>(n);
    }
    (void)gnutls_api().bye(session_, GNUTLS_SHUT_WR);
  }

  // Messages with and without data, one right behind the other, once the server has done its part.
  void mix(unsigned times, std::binary_semaphore& server_is_done) {
    if (!shake_hands()) return;
    server_is_done.acquire();
    for (unsigned i = 0; i < times; ++i) {
      (void)GNUTLS(session_key_update)(session_, 0);
      (void)gnutls_api().record_send(session_, "x", 1);
    }
  }

  std::string cipher = {};
  size_t taken = 0;

 private:
  bool shake_hands() {
    int status = GNUTLS_E_AGAIN;
    while (status == GNUTLS_E_AGAIN || status == GNUTLS_E_INTERRUPTED) {
      status = gnutls_api().handshake(session_);
    }
    return status == GNUTLS_E_SUCCESS;
  }
  void send() {
    const std::vector<char> data(kData, 'x');
    for (size_t done = 0; done < kData;) {
      const ssize_t n = gnutls_api().record_send(session_, data.data() + done, kData - done);
      if (n <= 0) return;
      done += static_cast<size_t>(n);
    }
  }
  gnutls_session_t session_ = nullptr;
  gnutls_psk_client_credentials_t keys_ = nullptr;
};

// The stack of the fiber that runs, below its present frame.
class PaintedStack {
 public:
  PaintedStack() : bottom_(here() - base::Fiber::current()->stack_left()) {}
  [[gnu::noinline, gnu::no_sanitize_address]] void paint() {
    volatile char* const end = static_cast<char*>(__builtin_frame_address(0)) - 256;
    top_ = static_cast<char*>(__builtin_frame_address(0));
    for (volatile char* p = bottom_; p < end; ++p) *p = kPaint;
  }
  // How far down the calls since paint() reached.
  [[gnu::noinline, gnu::no_sanitize_address]] size_t depth() const {
    const volatile char* p = bottom_;
    while (p < top_ && *p == kPaint) ++p;
    return static_cast<size_t>(top_ - const_cast<const char*>(p));
  }

 private:
  static constexpr char kPaint = 0x5a;
  static char* here() { return static_cast<char*>(__builtin_frame_address(0)); }
  char* const bottom_;
  char* top_ = nullptr;
};

class TlsSessions : public testing::Test {
 protected:
  TlsSessions() : path_(testing::TempDir() + "nbd_tls_session_" + std::to_string(::getpid())) {
    std::filesystem::create_directory(path_);
    std::ofstream(path_ + "/keys.psk") << "alice:" << std::string(64, 'a') << "\n";
  }
  ~TlsSessions() override { std::filesystem::remove_all(path_); }

  struct Ends {
    Ends() {
      int pair[2] = {-1, -1};
      EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
      ours.reset(pair[0]);
      theirs.reset(pair[1]);
      ::fcntl(ours.get(), F_SETFL, O_NONBLOCK);
    }
    base::UniqueFd ours, theirs;
  };
  std::shared_ptr<const TlsCredentials> credentials() const {
    TlsOptions options;
    options.kind = TlsOptions::Kind::kPsk;
    options.directory = path_;
    return std::make_shared<const TlsCredentials>(options);
  }
  struct Outcome {
    std::string cipher;
    size_t received = 0;
    size_t taken = 0;
    size_t depth = 0;
  };

  Outcome talk(const std::string& client_priority) {
    const Ends ends;
    TlsSession session(credentials(), ends.ours.get());
    TlsClient client(ends.theirs.get(), client_priority);
    std::thread thread([&] {
      client.run();
      // Whatever became of it, the other end does not wait.
      ::shutdown(ends.theirs.get(), SHUT_RDWR);
    });
    while (session.handshake() != TlsSession::Step::kDone) ::usleep(100);
    Outcome out;
    base::LoopGroup loops(1);
    loops.loop(0).call("tls", [&] { serve(session, out); });
    thread.join();
    out.cipher = client.cipher;
    out.taken = client.taken;
    return out;
  }

 private:
  static void serve(TlsSession& session, Outcome& out) {
    PaintedStack stack;
    stack.paint();
    std::vector<std::byte> data(kData);
    iovec whole{data.data(), data.size()};
    while (out.received < 2 * kData) {
      const int64_t n = session.try_receive({&whole, 1});
      if (n == 0 || (n < 0 && n != -EAGAIN)) break;
      if (n > 0) out.received += static_cast<size_t>(n);
    }
    for (size_t sent = 0; sent < kData;) {
      iovec parts[2] = {{data.data() + sent, std::min<size_t>(16, kData - sent)}, {nullptr, 0}};
      parts[1] = {data.data() + sent + parts[0].iov_len, kData - sent - parts[0].iov_len};
      const int64_t n = session.try_send(parts);
      if (n < 0 && n != -EAGAIN) break;
      if (n > 0) sent += static_cast<size_t>(n);
    }
    session.bye();
    out.depth = stack.depth();
  }

  const std::string path_;
};

// What GnuTLS does on a fiber is records, and messages in between: new keys, tickets. (Handshakes
// run in a pool.) A quarter of a fiber's 64 KiB is what this may take: there are callers above.
TEST_F(TlsSessions, FitOnAFibersStack) {
  const std::string keys = ":+ECDHE-PSK:+DHE-PSK:+PSK";
  for (const std::string priority :
       {"NORMAL", "NORMAL:-VERS-ALL:+VERS-TLS1.2", "NORMAL:-CIPHER-ALL:+CHACHA20-POLY1305",
        "NORMAL:-VERS-ALL:+VERS-TLS1.2:-CIPHER-ALL:+AES-256-CBC:+AES-128-CBC",
        "NORMAL:-CIPHER-ALL:+AES-128-CCM"}) {
    const Outcome out = talk(priority + keys);
    EXPECT_EQ(out.received, 2 * kData) << priority;
    EXPECT_EQ(out.taken, kData) << priority;
    EXPECT_LT(out.depth, 16u << 10) << priority << ", " << out.cipher;
    RecordProperty(priority, std::to_string(out.depth));
  }
}

// New keys and a request in one piece: the socket has nothing more to tell, so all that came is
// given before the caller is told to wait.
TEST_F(TlsSessions, DataBehindNewKeysIsNotLeftLying) {
  const Ends ends;
  TlsSession session(credentials(), ends.ours.get());
  TlsClient client(ends.theirs.get(), "NORMAL:-VERS-ALL:+VERS-TLS1.3:+PSK:+DHE-PSK:+ECDHE-PSK");
  constexpr unsigned kTimes = 4;
  // Where a handshake took the first new keys and the rest came later, the socket would tell.
  std::binary_semaphore server_is_done(0);
  std::thread thread([&] { client.mix(kTimes, server_is_done); });
  while (session.handshake() != TlsSession::Step::kDone) ::usleep(100);
  server_is_done.release();
  thread.join();
  size_t received = 0;
  base::LoopGroup loops(1);
  loops.loop(0).call("tls", [&] {
    std::byte data[64];
    iovec whole{data, sizeof data};
    while (const int64_t n = session.try_receive({&whole, 1})) {
      if (n < 0) break;
      received += static_cast<size_t>(n);
    }
  });
  EXPECT_EQ(received, kTimes);
}

// Without the instructions ChaCha20 is the faster one, and the client's order counts.
TEST_F(TlsSessions, UseAesWhereTheProcessorHasInstructionsForIt) {
  const Outcome out = talk("NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK");
  const bool has_aes = __builtin_cpu_supports("aes") != 0 && __builtin_cpu_supports("pclmul") != 0;
  EXPECT_EQ(out.cipher, has_aes ? "AES-128-GCM" : "CHACHA20-POLY1305");
}

}  // namespace
}  // namespace minivmm::nbd
