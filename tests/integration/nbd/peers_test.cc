// SPDX-License-Identifier: Apache-2.0
// Other programs' clients against our server. What they say counts, not what we think we sent.
#include "peers.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <thread>

#include <gtest/gtest.h>

namespace minivmm::nbd {
namespace {

TEST_F(Peers, NbdinfoSeesWhatIsOffered) {
  SKIP_WITHOUT("nbdinfo");
  serve();
  const std::string info = must("nbdinfo \"" + uri("disk") + "\"");
  for (const char* const part :
       {"export-size: 67108864", "is_read_only: false", "can_multi_conn: true", "can_fua: true",
        "can_trim: true", "can_zero: true", "can_fast_zero: true", "can_cache: true",
        "can_df: true", "block_size_minimum: 1", "block_size_maximum: 33554432",
        "using structured packets"}) {
    expect_in(info, part);
  }
  expect_in(must("nbdinfo \"" + uri("ro") + "\""), "is_read_only: true");
  const std::string list = must("nbdinfo --list \"" + uri("") + "\"");
  for (const char* const name : {"\"disk\"", "\"ro\"", "\"mem\""}) expect_in(list, name);
  EXPECT_NE(run("nbdinfo \"" + uri("nosuch") + "\"").status, 0);
}

TEST_F(Peers, NbdinfoMapsDataAndHoles) {
  SKIP_WITHOUT("nbdinfo");
  serve();
  const std::string map = must("nbdinfo --map --totals \"" + uri("disk") + "\"");
  expect_in(map, "3145728");   // data
  expect_in(map, "63963136");  // hole,zero
  expect_in(map, "hole,zero");
}

// Data in the overlay is at depth 1, in its base at 2, and what neither has at 0.
TEST_F(Peers, NbdinfoMapsTheDepthOfAChain) {
  SKIP_WITHOUT("nbdinfo");
  SKIP_WITHOUT("qemu-img");
  must("qemu-img create -q -f qcow2 " + path("base.qcow2") + " 1M");
  must("qemu-io -c \"write 64k 128k\" " + path("base.qcow2"));
  must("qemu-img create -q -f qcow2 -F qcow2 -b base.qcow2 " + path("top.qcow2"));
  must("qemu-io -c \"write 0 64k\" -c \"write 128k 64k\" " + path("top.qcow2"));
  serve({"--disk=" + path("top.qcow2") + ",id=top,format=qcow2", "--export=top"});
  std::istringstream map(must("nbdinfo --map=qemu:allocation-depth \"" + uri("top") + "\""));
  std::vector<std::array<uint64_t, 3>> extents;
  for (std::string line; std::getline(map, line);) {
    std::istringstream words(line);
    std::array<uint64_t, 3> each{};
    words >> each[0] >> each[1] >> each[2];
    extents.push_back(each);
  }
  const std::vector<std::array<uint64_t, 3>> expected = {
      {0, 65536, 1}, {65536, 65536, 2}, {131072, 65536, 1}, {196608, 851968, 0}};
  EXPECT_EQ(extents, expected);
}

// What was written since each bitmap was made; one that is of no use is not offered.
TEST_F(Peers, NbdinfoMapsDirtyBitmaps) {
  SKIP_WITHOUT("nbdinfo");
  SKIP_WITHOUT("qemu-img");
  const std::string disk = path("dirty.qcow2");
  must("qemu-img create -q -f qcow2 " + disk + " 1M");
  must("qemu-img bitmap --add -g 64k " + disk + " full");
  must("qemu-io -c \"write 64k 64k\" " + disk);
  must("qemu-img bitmap --add -g 64k " + disk + " recent");
  must("qemu-io -c \"write 512k 128k\" " + disk);
  serve({"--disk=" + disk + ",id=dirty,format=qcow2", "--export=dirty,writable"});
  const auto map = [&](const std::string& bitmap) {
    std::istringstream lines(
        must("nbdinfo --map=qemu:dirty-bitmap:" + bitmap + " \"" + uri("dirty") + "\""));
    std::vector<std::array<uint64_t, 3>> extents;
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::array<uint64_t, 3> each{};
      words >> each[0] >> each[1] >> each[2];
      extents.push_back(each);
    }
    return extents;
  };
  using Extents = std::vector<std::array<uint64_t, 3>>;
  EXPECT_EQ(map("full"), (Extents{{0, 65536, 0},
                                  {65536, 65536, 1},
                                  {131072, 393216, 0},
                                  {524288, 131072, 1},
                                  {655360, 393216, 0}}));
  EXPECT_EQ(map("recent"), (Extents{{0, 524288, 0}, {524288, 131072, 1}, {655360, 393216, 0}}));
  // What a client writes is seen at once, also by another client.
  must("qemu-io -f raw -c \"write 0 4k\" \"" + uri("dirty") + "\"");
  EXPECT_EQ(map("recent").front(), (std::array<uint64_t, 3>{0, 65536, 1}));
  const std::string list = must("nbdinfo --list --json \"" + uri("dirty") + "\"");
  for (const char* const name :
       {"base:allocation", "qemu:dirty-bitmap:full", "qemu:dirty-bitmap:recent"}) {
    expect_in(list, name);
  }
  EXPECT_NE(run("nbdinfo --map=qemu:dirty-bitmap:nosuch \"" + uri("dirty") + "\"").status, 0);
}

TEST_F(Peers, NbdcopyReadsAndWritesWithFourConnections) {
  SKIP_WITHOUT("nbdcopy");
  serve();
  const std::string original = sum(path("disk.raw"));
  must("nbdcopy --connections=4 --requests=32 \"" + uri("disk") + "\" " + path("out.raw"));
  EXPECT_EQ(sum(path("out.raw")), original);
  must("nbdcopy --connections=4 --flush " + path("disk.raw") + " \"" + uri("mem") + "\"");
  must("nbdcopy --request-size=4096 \"" + uri("mem") + "\" " + path("back.raw"));
  EXPECT_EQ(sum(path("back.raw")), original);
}

TEST_F(Peers, QemuImgConvertsMapsAndCompares) {
  SKIP_WITHOUT("qemu-img");
  serve();
  const std::string here = "\"" + uri("disk") + "\"";
  expect_in(must("qemu-img info " + here), "virtual size: 64 MiB");
  must("qemu-img convert -f raw -O qcow2 " + here + " " + path("out.qcow2"));
  expect_in(must("qemu-img compare " + path("out.qcow2") + " " + here), "Images are identical");
  // The hole was told, not read: qcow2 did not grow by it.
  EXPECT_LT(std::filesystem::file_size(path("out.qcow2")), size_t{8} << 20);
  must("qemu-img convert -n -f qcow2 -O raw " + path("out.qcow2") + " \"" + uri("mem") + "\"");
  expect_in(must("qemu-img compare -f raw -F raw " + here + " \"" + uri("mem") + "\""),
            "Images are identical");
  expect_in(must("qemu-img map --output=json -f raw " + here), "\"zero\": true, \"data\": false");
}

TEST_F(Peers, QemuIoDoesEverythingThatItCan) {
  SKIP_WITHOUT("qemu-io");
  serve();
  const std::string out = must(
      "qemu-io -f raw -c \"write -P 0xab 4095 70000\" -c \"read -P 0xab 4095 70000\" "
      "-c \"write -z 8192 8192\" -c \"read -P 0 8192 8192\" -c \"write -z -u 65536 65536\" "
      "-c \"read -P 0 65536 65536\" -c \"write -f -P 0x11 1M 64k\" -c \"read -P 0x11 1M 64k\" "
      "-c \"discard 2M 1M\" -c \"aio_write -P 5 3M 1M\" -c \"aio_write -P 6 4M 1M\" "
      "-c aio_flush -c \"read -P 5 3M 1M\" -c \"read -P 6 4M 1M\" -c flush \"" +
      uri("disk") + "\"");
  EXPECT_EQ(out.find("verification failed"), std::string::npos) << out;
  EXPECT_EQ(out.find("rror"), std::string::npos) << out;
  // Another connection sees it; a read-only export takes nothing.
  EXPECT_EQ(must("qemu-io -f raw -c \"read -P 6 4M 1M\" \"" + uri("disk") + "\"").find("failed"),
            std::string::npos);
  EXPECT_NE(run("qemu-io -f raw -c \"write 0 512\" \"" + uri("ro") + "\"").status, 0);
}

TEST_F(Peers, QemuNbdListsTheExports) {
  SKIP_WITHOUT("qemu-nbd");
  serve();
  const std::string list = must("qemu-nbd --list --socket=" + path("m.sock"));
  for (const char* const part :
       {"exports available: 3", "export: 'disk'", "export: 'ro'", "export: 'mem'",
        "size:  67108864", "min block: 1", "base:allocation"}) {
    expect_in(list, part);
  }
}

TEST_F(Peers, NbdClientListsTheExports) {
  SKIP_WITHOUT("nbd-client");
  serve();
  const std::string list = must("/usr/sbin/nbd-client -l -unix " + path("m.sock"));
  for (const char* const name : {"disk", "ro", "mem"}) expect_in(list, name);
}

TEST_F(Peers, FioVerifiesWhatItWritesOnFourConnections) {
  SKIP_WITHOUT("fio");
  serve();
  const Outcome outcome =
      run("fio --name=v --ioengine=nbd --uri=\"" + uri("disk") +
          "\" --rw=randwrite --bsrange=512-128k --bs_unaligned=0 --iodepth=16 --size=16M "
          "--numjobs=4 --offset_increment=16M --verify=crc32c --do_verify=1 --thread "
          "--group_reporting");
  if (outcome.output.find("engine nbd not loadable") != std::string::npos ||
      outcome.output.find("failed to load engine") != std::string::npos) {
    GTEST_SKIP() << "this fio has no nbd engine";
  }
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  expect_in(outcome.output, "err= 0");
}

TEST_F(Peers, TcpOverBothFamiliesAndTheEpollLoop) {
  SKIP_WITHOUT("nbdcopy");
  serve({"--io-backend=epoll", "--nbd=nbd://127.0.0.1:0", "--nbd=nbd://[::1]:0"});
  const std::string original = sum(path("disk.raw"));
  const std::vector<std::string> uris = tcp_uris("disk");
  EXPECT_EQ(uris.size(), 2u) << server_->output();
  for (const std::string& each : uris) {
    must("nbdcopy --connections=4 \"" + each + "\" " + path("out.raw"));
    EXPECT_EQ(sum(path("out.raw")), original) << each;
  }
}

TEST_F(Peers, AKilledServersSocketDoesNotBlockTheNext) {
  SKIP_WITHOUT("nbdinfo");
  serve();
  server_->signal(SIGKILL);
  EXPECT_EQ(server_->wait(10), 128 + SIGKILL);
  EXPECT_TRUE(std::filesystem::exists(path("m.sock")));
  serve();
  must("nbdinfo --size \"" + uri("disk") + "\"");
}

TEST_F(Peers, ASignalEndsTheServerUnderLoad) {
  SKIP_WITHOUT("nbdcopy");
  serve();
  Outcome copy;
  std::thread load([&] {
    copy = run("while nbdcopy --connections=4 \"" + uri("disk") + "\" null:; do :; done");
  });
  ::usleep(500'000);
  server_->signal(SIGUSR1);
  ::usleep(100'000);
  server_->signal(SIGTERM);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(server_->wait(10), 0) << server_->output();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  load.join();
  expect_in(server_->output(), "NBD export 'disk'");
  server_.reset();
}

}  // namespace
}  // namespace minivmm::nbd
