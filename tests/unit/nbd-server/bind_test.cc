// SPDX-License-Identifier: Apache-2.0
// Listening: where, with which rights, and what is in the way.
#include "nbd-server/bind.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>
#include <filesystem>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

class Listening : public ServerTest {
 protected:
  Listening() {
    std::string name = testing::TempDir() + "nbd_bind_XXXXXX";
    directory_ = ::mkdtemp(name.data());
    path_ = directory_ + "/m.sock";
    add("disk", "driver=memory,size=1M", false);
  }
  ~Listening() override { std::filesystem::remove_all(directory_); }

  std::string listen(const std::string& uri, bool remote = false) {
    return on_fiber(
        [&] { return server_->listen({.uri = uri, .fd = {}, .allow_remote = remote}); });
  }
  std::string unix_uri() const { return "nbd+unix:///?socket=" + path_; }
  base::UniqueFd connect_unix() {
    base::UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      return base::UniqueFd();
    }
    return fd;
  }

  std::string directory_;
  std::string path_;
};

TEST_F(Listening, AUnixSocketIsForItsOwnerOnlyAndGoesWithTheServer) {
  const mode_t old = ::umask(0);
  EXPECT_EQ(listen(unix_uri()), unix_uri());
  ::umask(old);
  struct stat found {};
  ASSERT_EQ(::lstat(path_.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode, S_IFSOCK | 0600u);
  Client client(connect_unix());
  client.enter("disk");
  EXPECT_EQ(client.read(0, 512).size(), 512u);
  EXPECT_EQ(server_->uris(), std::vector<std::string>{"nbd+unix:///disk?socket=" + path_});
  on_fiber([&] { (void)server_->stop(base::Clock::now() + std::chrono::seconds(5)); });
  EXPECT_NE(::lstat(path_.c_str(), &found), 0);
  // Nothing is left of the passing name either.
  EXPECT_TRUE(std::filesystem::is_empty(directory_));
}

TEST_F(Listening, ALiveSocketIsRefusedByName) {
  listen(unix_uri());
  try {
    listen(unix_uri());
    ADD_FAILURE();
  } catch (const base::Error& e) {
    EXPECT_EQ(e.err(), EADDRINUSE);
    EXPECT_NE(std::string(e.what()).find(path_), std::string::npos);
  }
  EXPECT_TRUE(connect_unix());  // and it was left alone
}

TEST_F(Listening, TheSocketOfADeadProcessIsReplaced) {
  {
    const base::UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    ASSERT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  listen(unix_uri());
  EXPECT_TRUE(connect_unix());
}

// A relative path that fits is enough, also where something is in the way: the absolute one is
// longer than a socket's address may be.
TEST_F(Listening, TheSocketOfADeadProcessIsReplacedDeepDown) {
  const std::filesystem::path deep =
      std::filesystem::path(directory_) / std::string(60, 'x') / std::string(60, 'y');
  std::filesystem::create_directories(deep);
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::current_path(deep);
  path_ = "m.sock";
  {
    const base::UniqueFd dead(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, path_.c_str(), sizeof address.sun_path - 1);
    EXPECT_EQ(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  EXPECT_EQ(error_number([&] { EXPECT_EQ(listen(unix_uri()), unix_uri()); }), 0);
  EXPECT_TRUE(connect_unix());
  EXPECT_EQ(error_number([&] { listen(unix_uri()); }), EADDRINUSE);
  std::filesystem::current_path(before);
}

TEST_F(Listening, ThePathMeansWhatTheSystemTakesItFor) {
  std::filesystem::create_directories(directory_ + "/other/deep");
  std::filesystem::create_directory_symlink(directory_ + "/other/deep", directory_ + "/link");
  listen("nbd+unix:///?socket=" + directory_ + "/link/../m.sock");
  path_ = directory_ + "/other/m.sock";
  EXPECT_TRUE(connect_unix());
  for (const char* const bad : {"/", "/.", "/other/.."}) {
    EXPECT_EQ(error_number([&] { listen("nbd+unix:///?socket=" + directory_ + bad); }), EINVAL);
  }
}

TEST_F(Listening, WhatIsNotASocketIsNotTouched) {
  const base::UniqueFd file(::open(path_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  EXPECT_EQ(error_number([&] { listen(unix_uri()); }), EEXIST);
  struct stat found {};
  EXPECT_EQ(::lstat(path_.c_str(), &found), 0);
  EXPECT_TRUE(S_ISREG(found.st_mode));
}

TEST_F(Listening, ASocketThatAnotherServerHasMadeSinceIsNotRemoved) {
  listen(unix_uri());
  ASSERT_EQ(::unlink(path_.c_str()), 0);
  const base::UniqueFd file(::open(path_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  on_fiber([&] { (void)server_->stop(base::Clock::now() + std::chrono::seconds(5)); });
  struct stat found {};
  EXPECT_EQ(::lstat(path_.c_str(), &found), 0);
}

TEST_F(Listening, PathsThatAreTooLongOrNotThereAreErrors) {
  EXPECT_EQ(error_number([&] { listen("nbd+unix:///?socket=/" + std::string(200, 'x')); }),
            ENAMETOOLONG);
  EXPECT_EQ(error_number([&] { listen("nbd+unix:///?socket=" + directory_ + "/no/m.sock"); }),
            ENOENT);
  EXPECT_EQ(error_number([&] { listen("nbd+unix:///disk?socket=" + path_); }), EINVAL);
}

TEST_F(Listening, TcpTellsItsPortAndServes) {
  const std::string uri = listen("nbd://127.0.0.1:0");
  const Uri bound = parse_uri(uri);
  EXPECT_NE(bound.port, 0);
  base::UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(bound.port);
  ASSERT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  Client client(std::move(fd));
  client.enter("disk");
  EXPECT_EQ(client.read(0, 4096).size(), 4096u);
  // The port is taken: found out after patience, and said with the address.
  try {
    listen(uri);
    ADD_FAILURE();
  } catch (const base::Error& e) {
    EXPECT_EQ(e.err(), EADDRINUSE);
    EXPECT_NE(std::string(e.what()).find(uri), std::string::npos);
  }
}

TEST_F(Listening, BeyondLoopbackOnlyWhenAllowed) {
  EXPECT_EQ(error_number([&] { listen("nbd://0.0.0.0:0"); }), EACCES);
  EXPECT_EQ(error_number([&] { listen("nbd://[::]:0"); }), EACCES);
  EXPECT_NE(listen("nbd://0.0.0.0:0", true), "");
  EXPECT_EQ(listen("nbd://:0").substr(0, 16), "nbd://127.0.0.1:");
}

TEST_F(Listening, AnInheritedSocketIsTakenOver) {
  base::UniqueFd fd(::socket(AF_INET, SOCK_STREAM, 0));
  const int raw = fd.get();
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(::bind(raw, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  const auto adopt_it = [&](base::UniqueFd given) {
    return on_fiber([&] {
      return server_->listen({.uri = {}, .fd = std::move(given), .allow_remote = false});
    });
  };
  base::UniqueFd not_listening(::dup(raw));
  EXPECT_EQ(error_number([&] { adopt_it(std::move(not_listening)); }), EINVAL);
  ASSERT_EQ(::listen(raw, 5), 0);
  socklen_t length = sizeof address;
  ASSERT_EQ(::getsockname(raw, reinterpret_cast<sockaddr*>(&address), &length), 0);
  EXPECT_EQ(adopt_it(std::move(fd)), "nbd://127.0.0.1:" + std::to_string(ntohs(address.sin_port)));
  EXPECT_EQ(::fcntl(raw, F_GETFD), FD_CLOEXEC) << "programs that we start do not need it";
  base::UniqueFd peer(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::connect(peer.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  Client client(std::move(peer));
  client.enter("disk");
}

class OneClient : public ServerTest {
 protected:
  OneClient() : ServerTest({.max_connections = 1}) { add("disk", "driver=memory,size=1M"); }
};

TEST_F(OneClient, FurtherClientsWaitUntilOneLeaves) {
  const std::string uri = on_fiber([&] { return server_->listen({.uri = "nbd://:0", .fd = {}}); });
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(parse_uri(uri).port);
  const auto dial = [&] {
    base::UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    return Client(std::move(fd));
  };
  Client first = dial();
  first.enter("disk");
  Client second = dial();
  std::byte byte;
  ::usleep(150'000);
  EXPECT_LT(::recv(second.fd(), &byte, 1, MSG_DONTWAIT), 0);  // not even greeted
  first.close();
  second.enter("disk");
}

}  // namespace
}  // namespace minivmm::nbd
