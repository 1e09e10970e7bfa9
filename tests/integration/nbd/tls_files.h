// SPDX-License-Identifier: Apache-2.0
// What tests of TLS need besides a server: keys, and certificates.
#pragma once

#include <string>

#include "peers.h"

namespace minivmm::nbd {

class TlsFiles : public Peers {
 protected:
  // In "keys": for alice and bob. In "wrong": another for alice.
  void make_keys() {
    const std::string key(64, 'a');
    std::filesystem::create_directory(path("keys"));
    std::filesystem::create_directory(path("wrong"));
    std::ofstream(path("keys/keys.psk")) << "alice:" << key << "\nbob:" << key << "\n";
    std::ofstream(path("wrong/keys.psk")) << "alice:" << std::string(64, 'b') << "\n";
  }
  // An authority and what it has signed: a server for this host, and a client.
  void make_certificates(const std::string& dir, const std::string& client) {
    std::filesystem::create_directory(path(dir));
    std::ofstream(path("san")) << "subjectAltName=IP:127.0.0.1,DNS:localhost\n";
    const std::string key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes ";
    must("openssl req -x509 -days 2 -subj /CN=authority " + key + "-keyout " +
         path(dir + "/ca-key.pem") + " -out " + path(dir + "/ca-cert.pem"));
    const auto issue = [&](const std::string& role, const std::string& name) {
      must("openssl req " + key + "-subj " + name + " -keyout " + path(dir + "/" + role) +
           "-key.pem -out " + path("request.pem"));
      must("openssl x509 -req -days 2 -in " + path("request.pem") + " -CA " +
           path(dir + "/ca-cert.pem") + " -CAkey " + path(dir + "/ca-key.pem") +
           " -CAcreateserial -extfile " + path("san") + " -out " + path(dir + "/" + role) +
           "-cert.pem");
    };
    issue("server", "/CN=server");
    issue("client", client);
  }
};

}  // namespace minivmm::nbd
