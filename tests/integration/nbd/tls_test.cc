// SPDX-License-Identifier: Apache-2.0
// TLS with other programs, in both roles: by pre-shared keys and by certificates.
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>

#include "tls_files.h"

namespace minivmm::nbd {
namespace {

// That nobody listens on; somebody else may take it before we do, which is rare enough.
std::string free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  EXPECT_EQ(::bind(fd, generic, size), 0);
  EXPECT_EQ(::getsockname(fd, generic, &size), 0);
  ::close(fd);
  return std::to_string(ntohs(address.sin_port));
}

class TlsPeers : public TlsFiles {
 protected:
  std::string key_uri(const std::string& who, const std::string& name,
                      const std::string& keys = "keys") const {
    return "\"nbds+unix://" + who + "@/" + name + "?socket=" + path("tls.sock") +
           "&tls-psk-file=" + path(keys + "/keys.psk") + "\"";
  }
  void serve_with_keys(const std::string& more = "") {
    make_keys();
    serve({"--object=tls-creds-psk,id=tls0,endpoint=server,dir=" + path("keys"),
           "--nbd=nbd+unix:///?socket=" + path("tls.sock") + ",tls-creds=tls0" + more,
           "--blockdev=driver=memory,node-name=hers,size=1M", "--export=hers,allow=alice"});
  }
  std::string log() const { return server_->output(); }
  // The server says why it ended a session after the client has seen the end.
  void expect_in_log(const std::string& part) const {
    for (int i = 0; i < 1000 && log().find(part) == std::string::npos; ++i) ::usleep(10'000);
    expect_in(log(), part);
  }
};

// Who has no key, or a wrong one, sees nothing; who is not named sees the rest.
TEST_F(TlsPeers, KeysOpenWhatTheyAreFor) {
  SKIP_WITHOUT("nbdinfo");
  serve_with_keys();
  expect_in(must("nbdinfo " + key_uri("alice", "hers")), "with TLS");
  EXPECT_NE(run("nbdinfo " + key_uri("bob", "hers")).status, 0);
  EXPECT_NE(run("nbdinfo \"nbd+unix:///disk?socket=" + path("tls.sock") + "\"").status, 0);
  // In the clear, on the other socket, she is nobody.
  EXPECT_NE(run("nbdinfo \"" + uri("hers") + "\"").status, 0);
  const std::string list = must("nbdinfo --list " + key_uri("bob", ""));
  expect_in(list, "\"disk\"");
  EXPECT_EQ(list.find("\"hers\""), std::string::npos) << list;
  // The wrong key, and a name that is not there, are told apart from a network that failed.
  EXPECT_EQ(log().find("was refused"), std::string::npos);
  const Outcome wrong = run("nbdinfo " + key_uri("alice", "disk", "wrong"));
  EXPECT_NE(wrong.status, 0);
  expect_in(wrong.output, "fatal alert");
  expect_in_log("was refused: TLS: ");
}

TEST_F(TlsPeers, MuchDataGoesThroughKeysBothWays) {
  SKIP_WITHOUT("nbdcopy");
  serve_with_keys();
  const std::string original = sum(path("disk.raw"));
  must("nbdcopy --connections=2 " + key_uri("bob", "disk") + " " + path("out.raw"));
  EXPECT_EQ(sum(path("out.raw")), original);
  must("nbdcopy --flush --connections=2 " + path("disk.raw") + " " + key_uri("bob", "mem"));
  // Our own client, by the URI and by an object.
  const std::string image = std::string(MINIVMM) + " image ";
  must(image + "convert -O raw " + key_uri("bob", "mem") + " " + path("back.raw"));
  EXPECT_EQ(sum(path("back.raw")), original);
  const std::string object =
      "--object tls-creds-psk,id=c,endpoint=client,username=bob,dir=" + path("keys");
  expect_in(must(image + "compare " + object + " --image-opts driver=raw,file.driver=nbd," +
                 "file.server.type=unix,file.server.path=" + path("tls.sock") +
                 ",file.export=mem,file.tls-creds=c driver=raw,file.driver=file,file.filename=" +
                 path("ro.raw")),
            "identical");
}

TEST_F(TlsPeers, QemuTalksWithKeys) {
  SKIP_WITHOUT("qemu-img");
  serve_with_keys();
  const auto options = [&](const std::string& name) {
    return "driver=nbd,server.type=unix,server.path=" + path("tls.sock") + ",export=" + name +
           ",tls-creds=c";
  };
  const auto object = [&](const std::string& who) {
    return " --object tls-creds-psk,id=c,endpoint=client,username=" + who + ",dir=" + path("keys") +
           " --image-opts ";
  };
  expect_in(must("qemu-img info" + object("alice") + options("hers")), "virtual size: 1 MiB");
  EXPECT_NE(run("qemu-img info" + object("bob") + options("hers")).status, 0);
  must("qemu-img convert -O qcow2" + object("bob") + options("disk") + " " + path("out.qcow2"));
  expect_in(must("qemu-img compare " + path("disk.raw") + " " + path("out.qcow2")), "identical");
}

TEST_F(TlsPeers, WhoWantsNoTlsNeedsNoneWhereItIsOptional) {
  SKIP_WITHOUT("nbdinfo");
  serve_with_keys(",tls=optional");
  const std::string plain = "\"nbd+unix:///disk?socket=" + path("tls.sock") + "\"";
  expect_in(must("nbdinfo " + plain), "without TLS");
  expect_in(must("nbdinfo " + key_uri("bob", "disk")), "with TLS");
  const std::string list = must("nbdinfo --list \"nbd+unix:///?socket=" + path("tls.sock") + "\"");
  EXPECT_EQ(list.find("\"hers\""), std::string::npos) << list;
}

// The client's certificate has to be signed by the authority, and its name counts.
TEST_F(TlsPeers, CertificatesOpenWhatTheyAreFor) {
  SKIP_WITHOUT("nbdinfo");
  SKIP_WITHOUT("openssl");
  make_certificates("pki", "/O=Example/CN=carol");
  make_certificates("other", "/O=Example/CN=carol");
  std::filesystem::copy_file(path("pki/ca-cert.pem"), path("other/ca-cert.pem"),
                             std::filesystem::copy_options::overwrite_existing);
  serve({"--object=tls-creds-x509,id=tls0,endpoint=server,dir=" + path("pki"),
         "--nbd=nbd://127.0.0.1:0,tls-creds=tls0",
         "--blockdev=driver=memory,node-name=hers,size=1M",
         "--export=hers,allow=O=Example,,CN=carol",
         "--blockdev=driver=memory,node-name=his,size=1M", "--export=his,allow=CN=dave"});
  const std::vector<std::string> uris = tcp_uris("hers", "nbds://127.");
  ASSERT_EQ(uris.size(), 1u) << log();
  const std::string at = uris[0].substr(0, uris[0].rfind('/'));
  const auto with = [&](const std::string& name, const std::string& pki) {
    return "\"" + at + "/" + name + "?tls-certificates=" + path(pki) + "\"";
  };
  expect_in(must("nbdinfo " + with("hers", "pki")), "with TLS");
  EXPECT_NE(run("nbdinfo " + with("his", "pki")).status, 0);
  EXPECT_EQ(log().find("was refused"), std::string::npos);
  EXPECT_NE(run("nbdinfo " + with("hers", "other")).status, 0);
  expect_in_log("was refused: TLS: ");
  const std::string original = sum(path("disk.raw"));
  must("nbdcopy " + with("disk", "pki") + " " + path("out.raw"));
  EXPECT_EQ(sum(path("out.raw")), original);
  // QEMU, and our own client.
  const std::string port = at.substr(at.rfind(':') + 1);
  const std::string object =
      " --object tls-creds-x509,id=c,endpoint=client,dir=" + path("pki") + " --image-opts ";
  const std::string keys = "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=" + port +
                           ",export=ro,tls-creds=c";
  expect_in(must("qemu-img info" + object + keys), "64 MiB");
  expect_in(must(std::string(MINIVMM) + " image compare" + object + keys +
                 " driver=raw,file.driver=file,file.filename=" + path("ro.raw")),
            "identical");
}

// Our client with other servers, and what it says where the server is not who it should be.
TEST_F(TlsPeers, OurClientTalksTlsWithNbdkitAndQemuNbd) {
  SKIP_WITHOUT("nbdkit");
  SKIP_WITHOUT("qemu-nbd");
  SKIP_WITHOUT("openssl");
  make_keys();
  make_certificates("pki", "/CN=client");
  make_certificates("other", "/CN=client");
  const std::string image = std::string(MINIVMM) + " image ";
  const std::string compare = image + "compare -f raw -F raw " + path("disk.raw") + " ";
  expect_in(must("nbdkit -U " + path("k.sock") +
                 " --tls=require --tls-psk=" + path("keys/keys.psk") + " file " + path("disk.raw") +
                 " --run \"" + compare + "nbds+unix://alice@/?socket=" + path("k.sock") +
                 "\\&tls-psk-file=" + path("keys/keys.psk") + "\""),
            "identical");
  const std::string port = free_port();
  const auto qemu = [&](const std::string& pki) {
    return run("qemu-nbd --fork --persistent --bind=127.0.0.1 --port=" + port + " --pid-file=" +
               path("q.pid") + " --object tls-creds-x509,id=t,endpoint=server,dir=" + path("pki") +
               " --tls-creds=t -x disk -r -f raw " + path("disk.raw") + " && { " + compare +
               "\"nbds://127.0.0.1:" + port + "/disk?tls-certificates=" + path(pki) +
               "\"; s=$?; kill $(cat " + path("q.pid") + "); exit $s; }");
  };
  const Outcome good = qemu("pki");
  EXPECT_EQ(good.status, 0) << good.output;
  expect_in(good.output, "identical");
  const Outcome bad = qemu("other");
  EXPECT_NE(bad.status, 0) << bad.output;
  expect_in(bad.output, "ertificate");
  // Over a unix socket this libnbd would not look at the certificate.
  expect_in(run(compare + "\"nbds+unix:///?socket=" + path("k.sock") +
                "&tls-certificates=" + path("pki") + "\"")
                .output,
            "k.sock");
}

}  // namespace
}  // namespace minivmm::nbd
