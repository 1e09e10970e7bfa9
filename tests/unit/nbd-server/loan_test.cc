// SPDX-License-Identifier: Apache-2.0
// Replies that are sent from where the node has the bytes: the right ones, also to who reads late,
// and in nobody's way.
#include <fcntl.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "base/io.h"
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

}  // namespace
}  // namespace minivmm::nbd
