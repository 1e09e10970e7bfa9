// SPDX-License-Identifier: Apache-2.0
// Replies that are sent from where the node has the bytes: the right ones, also to who reads late,
// and in nobody's way.
#include "block/graph/loan.h"

#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <string>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include "base/io.h"
#include "block/graph/node.h"
#include "fixture.h"
#include "tests/unit/block/temp_directory.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kRead = 0;
constexpr uint64_t kKiB = 1024;
constexpr uint64_t kMiB = 1024 * kKiB;

// Sixteen bytes tell which of the disk's and which version.
Bytes content(uint64_t offset, uint64_t length, uint64_t version = 0) {
  Bytes out;
  for (uint64_t at = offset; at < offset + length; at += 16) {
    const Bytes piece = join({be64(at), be64(version)});
    out.insert(out.end(), piece.begin(), piece.end());
  }
  return out;
}

class NbdLoans : public ServerTest {
 protected:
  NbdLoans() : ServerTest({}, 1) {
    const Bytes all = content(0, 4 * kMiB);
    directory_.write("disk", {reinterpret_cast<const char*>(all.data()), all.size()});
    add("disk", "driver=raw,file.driver=file,file.filename=" + file());
  }
  std::string file() const { return directory_ / "disk"; }

  // KiB of the file that this process has mapped and used: by lending only.
  uint64_t resident() const {
    std::ifstream maps("/proc/self/smaps");
    bool here = false;
    uint64_t sum = 0;
    for (std::string line; std::getline(maps, line);) {
      const bool begins = line.find('-') < line.find(' ');
      if (begins) here = line.find(" r--s ") != line.npos && line.find(file()) != line.npos;
      if (here && line.starts_with("Rss:")) sum += std::stoull(line.substr(4));
    }
    return sum;
  }

  // Asks for many pieces, and lets the server do what it can.
  static constexpr uint32_t kPiece = 64 * kKiB;
  static constexpr unsigned kPieces = 48;
  static constexpr unsigned kRequests = 6 * kPieces;  // far more than a socket takes
  static void ask_for_much(Client& client) {
    Bytes all;
    for (unsigned i = 0; i < kRequests; ++i) {
      // Not adjacent ones.
      const Bytes one = client.request(kRead, i, (i * 7 % kPieces) * kPiece, kPiece);
      all.insert(all.end(), one.begin(), one.end());
    }
    client.send(all);
    ::usleep(100'000);
  }
  // Each whole piece, or each 4 KiB of one, may be of this version or that.
  static void expect_versions(Client& client, uint64_t most) {
    for (unsigned i = 0; i < kRequests; ++i) {
      const Reply reply = client.simple(kPiece);
      ASSERT_EQ(reply.error, 0u);
      const uint64_t offset = (reply.cookie * 7 % kPieces) * kPiece;
      ASSERT_EQ(reply.payload.size(), kPiece);
      for (uint64_t at = 0; at < kPiece; at += 16) {
        ASSERT_EQ(reply.number(at, 8), offset + at);
        ASSERT_LE(reply.number(at + 8, 8), most);
      }
    }
  }

  block::TempDirectory directory_;
};

TEST_F(NbdLoans, SmallReadsAreAnsweredFromThePageCache) {
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(resident(), 0u);
  EXPECT_EQ(client.read(kMiB, 4096), content(kMiB, 4096));
  EXPECT_GT(resident(), 0u);
  EXPECT_EQ(client.read(4 * kMiB - 16, 16), content(4 * kMiB - 16, 16));
  EXPECT_EQ(client.read(2 * kMiB - 16, 32), content(2 * kMiB - 16, 32));
  EXPECT_EQ(client.read(0, 65536), content(0, 65536));
  EXPECT_EQ(client.read(0, 131072), content(0, 131072));
}

TEST_F(NbdLoans, StructuredAndExtendedRepliesToo) {
  Client structured = connect();
  structured.enter("disk", true);
  structured.send(structured.request(kRead, 9, 4096, 4096));
  const Reply chunk = structured.chunk();
  EXPECT_EQ(chunk.cookie, 9u);
  EXPECT_EQ(Bytes(chunk.payload.begin() + 8, chunk.payload.end()), content(4096, 4096));
  Client extended = connect();
  extended.enter_extended("disk");
  const Reply reply = extended.ask(kRead, 8192, 4096);
  EXPECT_EQ(Bytes(reply.payload.begin() + 8, reply.payload.end()), content(8192, 4096));
  EXPECT_GT(resident(), 0u);
}

TEST_F(NbdLoans, AdjacentReadsAreAnsweredEachByItself) {
  Client client = connect();
  client.enter("disk");
  Bytes all;
  for (unsigned i = 0; i < 40; ++i) {
    const Bytes one = client.request(kRead, i, i * 4096, 4096);
    all.insert(all.end(), one.begin(), one.end());
  }
  client.send(all);
  for (unsigned i = 0; i < 40; ++i) {
    const Reply reply = client.simple(4096);
    EXPECT_EQ(reply.payload, content(reply.cookie * 4096, 4096));
  }
}

// What the socket did not take is borrowed again, and is by then what has been written meanwhile.
TEST_F(NbdLoans, WhoReadsLateGetsWhatIsThereThen) {
  Client late = connect();
  late.enter("disk");
  ask_for_much(late);
  Client writer = connect();
  writer.enter("disk");
  EXPECT_EQ(writer.error_of(1, 0, 4 * kMiB, 0, content(0, 4 * kMiB, 1)), 0u);
  expect_versions(late, 1);
  EXPECT_EQ(late.read(0, 4096), content(0, 4096, 1));
}

// Nothing of the graph waits for a client.
TEST_F(NbdLoans, UnreadRepliesHoldNoDrainUp) {
  Client late = connect();
  late.enter("disk");
  ask_for_much(late);
  on_fiber([&] { const block::Graph::Drain drain(graph_, std::chrono::seconds(10)); });
  expect_versions(late, 0);
}

// What is not in memory when there is room again is read.
TEST_F(NbdLoans, WhatHasLeftTheMemoryMeanwhileIsRead) {
  Client late = connect();
  late.enter("disk");
  ask_for_much(late);
  // Another file under the name's node would be cheating: this one is written out and dropped.
  const base::UniqueFd fd(::open(file().c_str(), O_RDWR | O_CLOEXEC));
  (void)::fsync(fd.get());
  (void)::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  expect_versions(late, 0);
}

TEST_F(NbdLoans, OfACutFileReadsSayAnErrorOrZeroesAndOthersGoOn) {
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(3 * kMiB, 4096), content(3 * kMiB, 4096));
  std::filesystem::resize_file(file(), kMiB);
  // As without lending: what is not there reads as zeroes.
  EXPECT_EQ(client.read(3 * kMiB, 4096), Bytes(4096));
  EXPECT_EQ(client.read(4096, 4096), content(4096, 4096));
  Bytes both = join({client.request(kRead, 1, 8192, 4096), client.request(kRead, 2, 2 * kMiB, 4096),
                     client.request(kRead, 3, 16384, 4096)});
  client.send(both);
  std::map<uint64_t, Bytes> replies;
  for (int i = 0; i < 3; ++i) {
    const Reply reply = client.simple(4096);
    replies[reply.cookie] = reply.payload;
  }
  EXPECT_EQ(replies[1], content(8192, 4096));
  EXPECT_EQ(replies[2], Bytes(4096));
  EXPECT_EQ(replies[3], content(16384, 4096));
}

TEST_F(NbdLoans, AClientThatLeavesWithItsRepliesUnreadLeavesNothingBehind) {
  for (int i = 0; i < 5; ++i) {
    Client late = connect();
    late.enter("disk");
    ask_for_much(late);
  }
  on_fiber([&] { const block::Graph::Drain drain(graph_, std::chrono::seconds(10)); });
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 4096), content(0, 4096));
}

// It would count as the memory of a server that does nothing.
TEST_F(NbdLoans, WhatWasLentGoesWithTheLastClient) {
  Client first = connect();
  first.enter("disk");
  EXPECT_EQ(first.read(kMiB, 4096), content(kMiB, 4096));
  {
    Client second = connect();
    second.enter("disk");
    EXPECT_EQ(second.read(0, 4096), content(0, 4096));
  }
  EXPECT_EQ(first.read(2 * kMiB, 4096), content(2 * kMiB, 4096));
  EXPECT_GT(resident(), 0u);
  first.close();
  for (int i = 0; i < 1000 && resident() > 0; ++i) ::usleep(10'000);
  EXPECT_EQ(resident(), 0u);
  Client third = connect();
  third.enter("disk");
  EXPECT_EQ(third.read(kMiB, 4096), content(kMiB, 4096));
  EXPECT_GT(resident(), 0u);
}

// TLS would touch the bytes itself, and die of what the kernel answers with an error.
TEST_F(NbdLoans, NothingIsLentToClientsWithTls) {
  directory_.write("keys.psk", "alice:" + std::string(64, 'a') + "\n");
  const std::string place = directory_ / "";
  ListenOptions options;
  options.uri = "nbd+unix:///?socket=" + place + "tls.sock";
  options.tls.mode = TlsOptions::Mode::kRequired;
  options.tls.kind = TlsOptions::Kind::kPsk;
  options.tls.directory = place;
  on_fiber([&] {
    (void)server_->listen(std::move(options));
    (void)graph_.add(block::Options::from_keys(
        "driver=nbd,node-name=remote,connections=1,uri=nbds+unix://alice@/disk?socket=" + place +
        "tls.sock&tls-psk-file=" + place + "keys.psk"));
    block::Handle remote =
        graph_.attach("remote", "the test", block::Permissions::front_end(false));
    for (const uint64_t size : {uint64_t{512}, 4 * kKiB, 64 * kKiB}) {
      Bytes read(size);
      remote.read(kMiB, base::SingleBuffer(read.data(), size));
      EXPECT_EQ(read, content(kMiB, size));
    }
    remote.close();
    graph_.remove("remote");
  });
  EXPECT_EQ(resident(), 0u);
  Client plain = connect();
  plain.enter("disk");
  EXPECT_EQ(plain.read(kMiB, 4096), content(kMiB, 4096));
  EXPECT_GT(resident(), 0u);
}

// --- what was lent and is not there any more ---

// A page of it can be lent and not be sent, as one of a file that was cut or whose device failed.
class Torn final : public block::Node {
 public:
  static constexpr uint64_t kTorn = 2 * kMiB;

  Torn() : Node("torn", "torn", true), all_(content(0, 4 * kMiB)) {
    set_size(all_.size());
    void* const memory =
        ::mmap(nullptr, all_.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    lent_ = static_cast<std::byte*>(memory);
    std::memcpy(lent_, all_.data(), all_.size());
    EXPECT_EQ(::mprotect(lent_ + kTorn, 4096, PROT_NONE), 0);
  }
  ~Torn() override { (void)::munmap(lent_, all_.size()); }

  std::atomic<bool> readable{false};
  std::atomic<unsigned> loans{0};

 private:
  void driver_read(uint64_t offset, base::IoSpan to) override {
    const bool torn = offset < kTorn + 4096 && offset + to.bytes() > kTorn;
    if (torn && !readable) throw base::Error(EIO, "it is torn");
    base::copy_to(to, 0, std::span(all_).subspan(offset, to.bytes()));
  }
  void driver_write(uint64_t, base::IoSpan, block::WriteFlags) override {}
  void driver_flush() override {}
  bool driver_lend(uint64_t offset, uint64_t, block::Loan& to) noexcept override {
    ++loans;
    to.lend(lent_ + offset);
    return true;
  }

  const Bytes all_;
  std::byte* lent_ = nullptr;
};

class NbdTornLoans : public ServerTest {
 protected:
  NbdTornLoans() : ServerTest({}, 1) {
    on_fiber([&] {
      graph_.adopt(disk_);
      server_->add_export("torn",
                          graph_.attach("torn", "the test", block::Permissions::front_end(false)));
    });
  }
  // Three at once, the second of which is torn.
  static void ask(Client& client) {
    client.send(
        join({client.request(kRead, 1, 0, 4096), client.request(kRead, 2, Torn::kTorn - 4096, 8192),
              client.request(kRead, 3, kMiB, 4096)}));
  }
  static void expect_first(Client& client) {
    const Reply reply = client.simple(4096);
    EXPECT_EQ(reply.cookie, 1u);
    EXPECT_EQ(reply.error, 0u);
    EXPECT_EQ(reply.payload, content(0, 4096));
  }
  static void expect_third_and_more(Client& client) {
    const Reply reply = client.simple(4096);
    EXPECT_EQ(reply.cookie, 3u);
    EXPECT_EQ(reply.payload, content(kMiB, 4096));
    EXPECT_EQ(client.read(3 * kMiB, 4096), content(3 * kMiB, 4096));
  }

  void expect_one_error(Client client) {
    client_.emplace(std::move(client));  // it stays, to be described
    client_->enter("torn");
    ask(*client_);
    expect_first(*client_);
    const Reply reply = client_->simple();
    EXPECT_EQ(reply.cookie, 2u);
    EXPECT_EQ(reply.error, 5u);
    expect_third_and_more(*client_);
    EXPECT_GE(disk_->loans, 4u);
  }
  // Nothing: there is no such network.
  template <typename Address>
  std::optional<Client> connect_over(Address here) {
    const int domain = reinterpret_cast<const sockaddr&>(here).sa_family;
    const base::UniqueFd listener(::socket(domain, SOCK_STREAM | SOCK_CLOEXEC, 0));
    base::UniqueFd ours(::socket(domain, SOCK_STREAM | SOCK_CLOEXEC, 0));
    socklen_t size = sizeof here;
    auto* const address = reinterpret_cast<sockaddr*>(&here);
    if (!listener || ::bind(listener.get(), address, size) != 0 ||
        ::listen(listener.get(), 1) != 0 || ::getsockname(listener.get(), address, &size) != 0 ||
        ::connect(ours.get(), address, size) != 0) {
      return std::nullopt;
    }
    server_->serve(base::UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC)));
    return Client(std::move(ours));
  }

  const std::shared_ptr<Torn> disk_ = std::make_shared<Torn>();
  std::optional<Client> client_;
};

TEST_F(NbdTornLoans, WhatCannotBeSentNorReadIsAnErrorOfThatRequest) {
  expect_one_error(connect());
  const std::vector<std::string> lines = server_->describe();
  const auto counted = [](const std::string& line) {
    return line.find("4 done, 1 errors") != line.npos;
  };
  EXPECT_TRUE(std::any_of(lines.begin(), lines.end(), counted)) << testing::PrintToString(lines);
}

TEST_F(NbdTornLoans, AlsoOverTcp) {
  sockaddr_in here{};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (auto client = connect_over(here)) {
    expect_one_error(std::move(*client));
  } else {
    GTEST_SKIP() << "no TCP: " << ::strerror(errno);
  }
}

// Where the kernel has another name for it.
TEST_F(NbdTornLoans, AlsoOverVsock) {
  sockaddr_vm here{};
  here.svm_family = AF_VSOCK;
  here.svm_cid = VMADDR_CID_LOCAL;
  here.svm_port = VMADDR_PORT_ANY;
  if (auto client = connect_over(here)) {
    expect_one_error(std::move(*client));
  } else {
    GTEST_SKIP() << "no vsock to this host: " << ::strerror(errno);
  }
}

TEST_F(NbdTornLoans, WithStructuredRepliesToo) {
  Client client = connect();
  client.enter("torn", true);
  client.send(client.request(kRead, 7, Torn::kTorn, 4096));
  const Reply reply = client.chunk();
  EXPECT_EQ(reply.cookie, 7u);
  EXPECT_EQ(reply.type, 0x8001u);
  EXPECT_EQ(reply.number(0, 4), 5u);
  EXPECT_GE(disk_->loans, 1u);
  EXPECT_EQ(client.error_of(kRead, 0, 4096), 0u);
}

TEST_F(NbdTornLoans, WhatCannotBeSentIsReadInstead) {
  disk_->readable = true;
  Client client = connect();
  client.enter("torn");
  ask(client);
  expect_first(client);
  const Reply reply = client.simple(8192);
  EXPECT_EQ(reply.cookie, 2u);
  EXPECT_EQ(reply.payload, content(Torn::kTorn - 4096, 8192));
  expect_third_and_more(client);
  // So long that its beginning is out when the rest cannot be sent.
  EXPECT_EQ(client.read(Torn::kTorn - 60 * kKiB, 64 * kKiB),
            content(Torn::kTorn - 60 * kKiB, 64 * kKiB));
  EXPECT_GE(disk_->loans, 5u);
}

// Where a part of a reply is out already nothing is left but the end, of this client.
TEST_F(NbdTornLoans, ABegunReplyThatCannotBeCompletedEndsTheConnection) {
  Client other = connect();
  other.enter("torn");
  Client client = connect();
  client.enter("torn");
  client.send(client.request(kRead, 1, Torn::kTorn - 60 * kKiB, 64 * kKiB));
  Bytes got;
  for (Bytes piece(64 * kKiB);;) {
    const ssize_t n = ::recv(client.fd(), piece.data(), piece.size(), 0);
    ASSERT_GE(n, 0);
    if (n == 0) break;
    got.insert(got.end(), piece.begin(), piece.begin() + n);
    // A kernel that takes it all or nothing: it is an error like any other.
    if (got.size() == 16 && (got[4] | got[5] | got[6] | got[7]) != std::byte{0}) break;
  }
  EXPECT_LE(got.size(), 16 + 60 * kKiB);
  EXPECT_EQ(other.read(0, 4096), content(0, 4096));
}

}  // namespace
}  // namespace minivmm::nbd
