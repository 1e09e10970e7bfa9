// SPDX-License-Identifier: Apache-2.0
// The driver: that what is written is read, is not to be seen in the file, and no more is touched.
#include <algorithm>
#include <cstring>

#include "base/sync.h"
#include "luks_fixture.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kMiB = 1 << 20;

class LuksNodeTest : public LuksTest {};

TEST_F(LuksNodeTest, RandomRequestsFromTwoLoopsMatchAByteArray) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  for (const char* cipher :
       {"", ",cipher-alg=aes-192", ",cipher-mode=cbc,ivgen-alg=essiv,cipher-alg=aes-128"}) {
    SCOPED_TRACE(cipher);
    constexpr uint64_t kSize = 3 * kMiB + 512;
    constexpr uint64_t kParts = 4;
    on_fiber([&] {
      create("disk", options(kSize, cipher));
      Handle disk = open("disk");
      ASSERT_EQ(disk.size(), kSize);
      // A new disk reads as noise.
      disk.write_zeroes(0, kSize, {});
      base::WaitGroup group;
      group.add(kParts);
      std::vector<std::vector<std::byte>> model(kParts);
      for (uint64_t part = 0; part < kParts; ++part) {
        loops_.loop(part % 2).post("worker", [&, part] {
          // The parts meet inside a sector.
          const uint64_t begin = part * kSize / kParts + (part == 0 ? 0 : 100);
          const uint64_t end = (part + 1) * kSize / kParts + (part + 1 == kParts ? 0 : 100);
          auto& mine = model[part];
          mine.resize(end - begin);
          std::mt19937_64 random(seed + part);
          for (int i = 0; i < 150; ++i) {
            const uint64_t at = random() % mine.size();
            const uint64_t most = random() % 4 == 0 ? 300'000 : 3000;
            const uint64_t length = std::min(mine.size() - at, random() % most + 1);
            const auto from = mine.begin() + static_cast<ptrdiff_t>(at);
            const auto to = from + static_cast<ptrdiff_t>(length);
            switch (random() % 4) {
              case 0:
              case 1: {
                const auto bytes = random_bytes(length, random());
                disk.write(begin + at, base::SingleBuffer(std::span<const std::byte>(bytes)),
                           {.fua = random() % 8 == 0});
                std::copy(bytes.begin(), bytes.end(), from);
                break;
              }
              case 2:
                disk.write_zeroes(begin + at, length, {.may_unmap = random() % 2 == 0});
                std::fill(from, to, std::byte{0});
                break;
              default:
                EXPECT_EQ(read_bytes(disk, begin + at, length), std::vector<std::byte>(from, to));
            }
          }
          group.done();
        });
      }
      group.wait();
      std::vector<std::byte> all;
      for (const auto& part : model) all.insert(all.end(), part.begin(), part.end());
      EXPECT_TRUE(read_bytes(disk, 0, kSize) == all);
      close(disk);
      disk = open("disk", false);
      EXPECT_TRUE(read_bytes(disk, 0, kSize) == all) << "after it was opened again";
      close(disk);
    });
  }
}

TEST_F(LuksNodeTest, NothingOfTheDataOrThePasswordIsInTheFile) {
  const std::string mark = "a text that must not be seen";
  on_fiber([&] {
    create("disk", options(kMiB));
    Handle disk = open("disk");
    std::vector<std::byte> text(kMiB);
    for (size_t i = 0; i + mark.size() < text.size(); i += 64) {
      std::memcpy(text.data() + i, mark.data(), mark.size());
    }
    write_bytes(disk, 0, text);
    disk.write_zeroes(512 * 1024, 128 * 1024, {.may_unmap = true});
    close(disk);
  });
  const std::string file = files_.read("disk");
  EXPECT_EQ(file.find(mark), std::string::npos);
  EXPECT_EQ(file.find("password 0"), std::string::npos);
  // Zeroes are written: neither a hole nor zeroes, and no sector is like another.
  const size_t payload = file.size() - kMiB;
  const std::string_view zeroes = std::string_view(file).substr(payload + 512 * 1024, 128 * 1024);
  EXPECT_EQ(zeroes.find(std::string(16, '\0')), std::string::npos);
  EXPECT_NE(zeroes.substr(0, 512), zeroes.substr(512, 512));
}

TEST_F(LuksNodeTest, OnlyTheRightPasswordOpensIt) {
  on_fiber([&] {
    create("disk", options(kMiB));
    EXPECT_FALSE(opens("disk", "sec1"));
    EXPECT_TRUE(opens("disk", "sec0"));
    const auto error = [&](const std::string& secret) {
      return error_text([&] { open("disk", true, "", secret); });
    };
    EXPECT_NE(error("sec1").find("Invalid password, cannot unlock any keyslot"), std::string::npos);
    EXPECT_NE(error("nobody").find("No secret with id 'nobody'"), std::string::npos);
    EXPECT_NE(error("").find("key-secret"), std::string::npos);
  });
}

TEST_F(LuksNodeTest, AnEmptyPasswordIsOne) {
  crypto::secrets().add("empty", crypto::SecureBytes());
  on_fiber([&] {
    luks::CreateOptions wanted = options(kMiB);
    wanted.crypto.key_secret = "empty";
    create("disk", wanted);
    EXPECT_TRUE(opens("disk", "empty"));
    EXPECT_FALSE(opens("disk", "sec0"));
  });
  crypto::secrets().remove("empty");
}

TEST_F(LuksNodeTest, PasswordsThatQemuCouldNotGiveAreRefusedForNewSlots) {
  crypto::secrets().add("binary", crypto::SecureBytes(bytes_of("\xff\xfe")));
  on_fiber([&] {
    luks::CreateOptions wanted = options(kMiB);
    wanted.crypto.key_secret = "binary";
    files_.write("disk", "kept");
    graph_.add(Options::from_keys("driver=file,node-name=new,filename=" + path("disk")));
    {
      Edge edge(graph_.find("new"), "create", Permissions::format_file(true));
      const std::string text = error_text([&] { luks::create_image(edge, wanted); });
      EXPECT_NE(text.find("not valid UTF-8"), std::string::npos) << text;
    }
    graph_.remove("new");
    EXPECT_EQ(files_.read("disk"), "kept") << "nothing is lost before it is known to be possible";
  });
  crypto::secrets().remove("binary");
}

TEST_F(LuksNodeTest, DiscardsReachTheFileOnlyWhereAsked) {
  for (const bool asked : {false, true}) {
    on_fiber([&] {
      create("disk", options(kMiB));
      Handle disk = open("disk", true, asked ? ",discard=unmap" : "");
      const auto bytes = random_bytes(kMiB, 7);
      write_bytes(disk, 0, bytes);
      disk.discard(256 * 1024, 512 * 1024);
      EXPECT_EQ(read_bytes(disk, 0, kMiB) == bytes, !asked);
      // What was not discarded is what it was.
      EXPECT_TRUE(std::equal(bytes.begin(), bytes.begin() + 256 * 1024,
                             read_bytes(disk, 0, 256 * 1024).begin()));
      EXPECT_FALSE(disk.block_status(256 * 1024, 4096).zero) << "a hole decrypts to noise";
      close(disk);
    });
  }
}

TEST_F(LuksNodeTest, ItGrowsAndShrinks) {
  on_fiber([&] {
    create("disk", options(kMiB));
    Handle disk = open("disk");
    const auto bytes = random_bytes(kMiB, 8);
    write_bytes(disk, 0, bytes);
    disk.truncate(2 * kMiB);
    EXPECT_EQ(disk.size(), 2 * kMiB);
    write_bytes(disk, 2 * kMiB - 512, std::vector<std::byte>(512, std::byte{1}));
    EXPECT_TRUE(read_bytes(disk, 0, kMiB) == bytes);
    disk.truncate(1000);
    EXPECT_EQ(disk.size(), 1024U);
    EXPECT_EQ(error_number([&] { disk.truncate(kMaxDiskSize); }), EFBIG);
    close(disk);
    disk = open("disk");
    EXPECT_EQ(disk.size(), 1024U);
    close(disk);
  });
}

TEST_F(LuksNodeTest, AFileThatIsCutOffHasFewerWholeSectors) {
  on_fiber([&] {
    create("disk", options(kMiB));
    std::filesystem::resize_file(path("disk"), std::filesystem::file_size(path("disk")) - 100);
    Handle disk = open("disk");
    EXPECT_EQ(disk.size(), kMiB - 512);
    close(disk);
  });
}

TEST_F(LuksNodeTest, ReadOnlyNodesAreNotAmended) {
  on_fiber([&] {
    create("disk", options(kMiB));
    Handle disk = open("disk", false);
    EXPECT_EQ(error_number([&] { amend("state=active,new-secret=sec1,iter-time=1"); }), EROFS);
    close(disk);
  });
}

TEST_F(LuksNodeTest, FactsSayWhatTheHeaderSays) {
  on_fiber([&] {
    create("disk", options(kMiB));
    Handle disk = open("disk");
    const Facts facts = graph_.find("disk")->facts();
    const auto fact = [&](const std::string& name) {
      for (const auto& [key, value] : facts) {
        if (key == name) return value;
      }
      return FactValue(std::string("missing"));
    };
    EXPECT_EQ(fact("cipher-alg"), FactValue(std::string("aes-256")));
    EXPECT_EQ(fact("cipher-mode"), FactValue(std::string("xts")));
    EXPECT_EQ(fact("ivgen-alg"), FactValue(std::string("plain64")));
    EXPECT_EQ(fact("slots.0.active"), FactValue(true));
    EXPECT_EQ(fact("slots.1.active"), FactValue(false));
    EXPECT_EQ(fact("slots.1.key-offset"), FactValue(uint64_t{262144}));
    EXPECT_EQ(fact("payload-offset"), FactValue(uint64_t{2068480}));
    close(disk);
  });
}

}  // namespace
}  // namespace minivmm::block
