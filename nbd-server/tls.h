// SPDX-License-Identifier: Apache-2.0
// What one end of TLS shows and asks for: read once, shared by its connections. The names of files
// are QEMU's: in the directory lie ca-cert.pem, ca-crl.pem (may be missing), server-cert.pem and
// server-key.pem, or keys.psk; for a client client-cert.pem and client-key.pem (may be missing).
#pragma once

#include <string>

#include <memory>

namespace minivmm::nbd {

// As server.h's ListenOptions carry it.
struct TlsOptions {
  enum class Mode { kOff, kOptional, kRequired };
  enum class Kind { kX509, kPsk };
  Mode mode = Mode::kOff;
  Kind kind = Kind::kX509;
  std::string directory = {};
  // GnuTLS's; empty: its usual one, without what is older than TLS 1.2, and AES before ChaCha20
  // where the processor has instructions for it.
  std::string priority = {};
  bool verify_peer = true;  // x509: the peer needs a certificate of our authority
};

// As a client.
struct TlsClientOptions {
  TlsOptions::Kind kind = TlsOptions::Kind::kX509;
  std::string directory = {};  // x509; empty: the system's authorities, and no certificate of ours
  std::string key_file = {};   // psk
  std::string user = {};       // psk: whose key of the file
  // x509: whom the server's certificate has to be for, a name or an address; empty: for anybody.
  std::string host = {};
  bool verify_peer = true;
};

class TlsCredentials {
 public:
  // Reads the files: not on a fiber. Throws naming the file and what is wrong with it. keys.psk is
  // read again for each client, so that keys can be added and taken away.
  explicit TlsCredentials(const TlsOptions& options);
  explicit TlsCredentials(const TlsClientOptions& options);
  ~TlsCredentials();
  TlsCredentials(const TlsCredentials&) = delete;
  TlsCredentials& operator=(const TlsCredentials&) = delete;

  // A handshake opens a file, which only errands can.
  bool handshake_reads_files() const noexcept { return options_.kind == TlsOptions::Kind::kPsk; }

 private:
  friend class TlsSession;
  void load_authority();
  void load_certificates();
  void load_keys();
  void load_client_certificates();
  void load_client_key(const TlsClientOptions& options);

  const TlsOptions options_;
  const bool is_client_ = false;
  const std::string host_;  // of a client
  struct Handles;
  std::unique_ptr<Handles> handles_;
};

}  // namespace minivmm::nbd
