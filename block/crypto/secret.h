// SPDX-License-Identifier: Apache-2.0
// Secret objects, as QEMU has them: passwords and keys by an id, so that options name them and do
// not hold them.
//
//   --object secret,id=sec0,file=PATH            the file's bytes, all of them
//   --object secret,id=sec0,data=TEXT            seen by whoever lists processes
//   format=raw|base64                            how file or data hold it
//   keyid=ID,iv=BASE64                           they hold it encrypted: AES-256-CBC with another
//                                                secret as the key; base64, padded as in PKCS#7
//
// The command line, or whatever else configures, adds them before nodes are opened; drivers get
// them by their option `key-secret`. Any thread.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <map>
#include <mutex>

#include "block/crypto/secure_bytes.h"
#include "block/graph/options.h"

namespace minivmm::block::crypto {

// Of a file or of data: more is refused.
inline constexpr size_t kMaxSecretBytes = 1 << 20;

class SecretStore {
 public:
  // The value of --object: "secret,id=...,data=...", or a JSON object with "qom-type". Reads files,
  // loads GnuTLS for keyid: not on a fiber. Throws EINVAL for what is wrong, EEXIST for an id that
  // is taken, what the file gives.
  void add_object(std::string_view text);
  // The same from the options behind the type: id, data or file, format, keyid, iv.
  void add(Options options);
  void add(const std::string& id, SecureBytes value);

  // A copy. Throws ENOENT: "No secret with id 'x'".
  SecureBytes get(const std::string& id) const;
  // For a password that is to encrypt: UTF-8 text, as QEMU demands. Throws EINVAL where it is not.
  SecureBytes get_text(const std::string& id) const;
  bool has(const std::string& id) const;
  void remove(const std::string& id);

 private:
  mutable std::mutex mutex_;
  std::map<std::string, SecureBytes, std::less<>> secrets_;  // guarded by mutex_
};

// The process's.
SecretStore& secrets();

}  // namespace minivmm::block::crypto
