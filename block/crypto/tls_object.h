// SPDX-License-Identifier: Apache-2.0
// TLS credentials as objects, as QEMU has them: where the files lie, by an id that listeners and
// disks name (tls-creds=ID).
//
//   --object tls-creds-x509,id=tls0,endpoint=server|client,dir=DIR[,verify-peer=off][,priority=P]
//   --object tls-creds-psk,id=tls0,endpoint=server|client,dir=DIR[,username=NAME][,priority=P]
//   --object authz-simple,id=authz0,identity=NAME
//
// The files in DIR have QEMU's names: ca-cert.pem, ca-crl.pem, server-cert.pem, server-key.pem,
// client-cert.pem, client-key.pem; keys.psk. They are read by who uses them. Any thread.
#pragma once

#include <string>

#include <map>
#include <mutex>

#include "base/nbd_uri.h"
#include "block/graph/options.h"

namespace minivmm::block::crypto {

struct TlsObject {
  enum class Kind { kX509, kPsk };
  Kind kind = Kind::kX509;
  bool server = false;
  std::string directory;
  bool verify_peer = true;
  std::string username = "qemu";
  std::string priority;
};

class TlsObjects {
 public:
  // The options behind the type. Throws EINVAL, EEXIST.
  void add(TlsObject::Kind kind, Options options);
  // Throws ENOENT where there is none, EINVAL where it is for the other end.
  TlsObject get(const std::string& id, bool server) const;

  // Who may be a client: a certificate's distinguished name, as `tls-authz` of qemu-nbd has it.
  // Throws EINVAL, EEXIST.
  void add_identity(Options options);
  // Throws ENOENT.
  std::string identity(const std::string& id) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::string, std::string, std::less<>> identities_;  // guarded by mutex_
  std::map<std::string, TlsObject, std::less<>> objects_;       // guarded by mutex_
};

// Has a client go by an object: TLS, and the files that it names.
void use_tls_object(const TlsObject& object, base::NbdUri& uri);

// The process's.
TlsObjects& tls_objects();

}  // namespace minivmm::block::crypto
