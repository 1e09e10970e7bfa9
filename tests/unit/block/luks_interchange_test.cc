// SPDX-License-Identifier: Apache-2.0
// Images of QEMU's tools and of cryptsetup, used by this driver, and the other way around.
#include <algorithm>
#include <cstring>

#include "luks_fixture.h"
#include "tests/support/slow.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr size_t kDisk = kMiB + 512 * 5;

struct Case {
  const char* name;
  const char* options;
  // QEMU measures its speed for seconds before it makes a key slot: the rest is for MINIVMM_SLOW=1.
  bool by_qemu = true;
};

constexpr Case kCases[] = {
    {"Default", ""},
    {"Aes128Xts", ",cipher-alg=aes-128", false},
    {"Aes192Xts", ",cipher-alg=aes-192"},
    {"Aes128CbcPlain", ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=plain"},
    {"Aes256CbcEssiv", ",cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256"},
    {"Aes128CbcEssiv", ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
     false},
    {"XtsEssiv", ",ivgen-alg=essiv,ivgen-hash-alg=sha256", false},
    {"Sha1", ",hash-alg=sha1", false},
    {"Sha512", ",hash-alg=sha512"},
    {"Sha384", ",hash-alg=sha384", false},
    {"Sha224", ",hash-alg=sha224", false},
};

class LuksInterchange : public LuksTest, public testing::WithParamInterface<Case> {
 protected:
  static constexpr const char* kSecrets =
      "--object secret,id=sec0,data='password 0' --object secret,id=sec1,data='password 1'";

  void SetUp() override {
    if (run("command -v qemu-img && command -v qemu-io") != 0) {
      GTEST_SKIP() << "qemu-img is missing";
    }
  }
  void must(const std::string& command) {
    ASSERT_EQ(run(command), 0) << command << "\n" << last_output_;
  }
  // QEMU measures by a clock that stands still for milliseconds, and gives up then.
  void qemu_with_clock(const std::string& command) {
    for (int i = 0; i < 200; ++i) {
      if (run(command) == 0) return;
      ASSERT_NE(last_output_.find("accurate CPU usage"), std::string::npos) << command << "\n"
                                                                            << last_output_;
    }
    FAIL() << "QEMU never found its clock: " << last_output_;
  }
  void qemu_create(const std::string& name, const std::string& options) {
    qemu_with_clock(
        fmt::format("qemu-img create -q -f luks {} -o key-secret=sec0,iter-time=10{} {} {}",
                    kSecrets, options, path(name), kDisk));
  }
  std::string image(const std::string& name, const std::string& secret = "sec0") const {
    return fmt::format("--image-opts driver=luks,key-secret={},file.driver=file,file.filename={}",
                       secret, path(name));
  }
  void expect_same_as_raw(const std::string& name, const std::vector<std::byte>& bytes,
                          const std::string& secret = "sec0") {
    files_.write("expected.raw", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    must(fmt::format("qemu-img convert -O raw {} {} {}", kSecrets, image(name, secret),
                     path("by-qemu.raw")));
    EXPECT_TRUE(files_.read("by-qemu.raw") == files_.read("expected.raw"));
  }
  // Up to random bytes and what was measured.
  void expect_same_layout(const std::string& name) {
    on_fiber([&] { create("ours", options(kDisk, GetParam().options)); });
    const auto read = [&](const std::string& image) {
      const std::string file = files_.read(image);
      return std::pair(file.size(), crypto::parse_luks1(bytes_of(file)));
    };
    const auto [our_size, ours] = read("ours");
    const auto [their_size, theirs] = read(name);
    EXPECT_EQ(our_size, their_size);
    EXPECT_EQ(ours.cipher, theirs.cipher);
    EXPECT_EQ(ours.cipher_mode, theirs.cipher_mode);
    EXPECT_EQ(ours.hash, theirs.hash);
    EXPECT_EQ(ours.payload_sector, theirs.payload_sector);
    EXPECT_EQ(ours.uuid.size(), theirs.uuid.size());
    for (size_t i = 0; i < crypto::kLuks1Slots; ++i) {
      EXPECT_EQ(ours.slots[i].active, theirs.slots[i].active);
      EXPECT_EQ(ours.slots[i].material_sector, theirs.slots[i].material_sector);
      EXPECT_EQ(ours.slots[i].stripes, theirs.slots[i].stripes);
    }
  }
  // What both have written so far, each on top of the other's.
  void write_by_turns(const std::string& name) {
    const uint64_t seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937_64 random(seed);
    auto model = random_bytes(kDisk, seed);
    on_fiber([&] {
      Handle disk = open(name);
      ASSERT_EQ(disk.size(), kDisk);
      write_bytes(disk, 0, model);
      close(disk);
    });
    for (int turn = 0; turn < 3; ++turn) {
      const auto range = [&] {
        const size_t at = random() % model.size();
        return std::pair(at, random() % std::min<size_t>(model.size() - at, 200'000) + 1);
      };
      std::string commands;
      for (int i = 0; i < 5; ++i) {
        auto [at, length] = range();
        at = at / 512 * 512;
        length = std::min((length + 511) / 512 * 512, model.size() - at);
        const auto value = static_cast<unsigned>(random() % 256);
        std::fill_n(model.begin() + static_cast<ptrdiff_t>(at), length, std::byte(value));
        commands += fmt::format(" -c 'write -P {} {} {}'", value, at, length);
      }
      must(fmt::format("qemu-io {} {} {}", kSecrets, commands, image(name)));
      EXPECT_EQ(last_output_.find("failed"), std::string::npos) << last_output_;
      on_fiber([&] {
        Handle disk = open(name);
        EXPECT_TRUE(read_bytes(disk, 0, model.size()) == model) << "what QEMU wrote";
        for (int i = 0; i < 5; ++i) {
          const auto [at, length] = range();
          const auto bytes = random_bytes(length, random());
          write_bytes(disk, at, bytes);
          std::copy(bytes.begin(), bytes.end(), model.begin() + static_cast<ptrdiff_t>(at));
        }
        close(disk);
      });
      expect_same_as_raw(name, model);
    }
  }
};

TEST_P(LuksInterchange, ImagesOfQemuAreWrittenByTurnsAndAreMadeAsOurs) {
  qemu_create("theirs", GetParam().options);
  if (HasFatalFailure()) return;
  expect_same_layout("theirs");
  write_by_turns("theirs");
}

TEST_P(LuksInterchange, ImagesOfOursAreWrittenByTurns) {
  on_fiber([&] { create("ours", options(kDisk, GetParam().options)); });
  write_by_turns("ours");
  must("qemu-img info --output=json " + path("ours"));
  EXPECT_NE(last_output_.find(fmt::format("\"virtual-size\": {}", kDisk)), std::string::npos);
}

TEST_P(LuksInterchange, PasswordsAreAddedAndErasedByBoth) {
  on_fiber([&] {
    create("disk", options(kDisk, GetParam().options));
    Handle disk = open("disk");
    disk.write_zeroes(0, kDisk, {});
    amend("state=active,new-secret=sec1,iter-time=1,keyslot=3");
    close(disk);
  });
  const std::vector<std::byte> zeroes(kDisk);
  expect_same_as_raw("disk", zeroes, "sec1");
  EXPECT_NE(run(fmt::format("qemu-io {} -c 'read 0 512' {}", kSecrets, image("disk", "sec2"))), 0);
  // QEMU erases the first, by the second.
  must(fmt::format("qemu-img amend {} {} -o state=inactive,old-secret=sec0", kSecrets,
                   image("disk", "sec1")));
  on_fiber([&] {
    EXPECT_FALSE(opens("disk", "sec0"));
    EXPECT_TRUE(opens("disk", "sec1"));
  });
  if (!GetParam().by_qemu && !slow_tests()) return;
  qemu_with_clock(fmt::format("qemu-img amend {} {} -o state=active,new-secret=sec0,iter-time=10",
                              kSecrets, image("disk", "sec1")));
  on_fiber([&] {
    Handle disk = open("disk");
    amend("state=inactive,keyslot=3");
    EXPECT_TRUE(read_bytes(disk, 0, kDisk) == zeroes);
    close(disk);
  });
  expect_same_as_raw("disk", zeroes);
  EXPECT_NE(run(fmt::format("qemu-io {} -c 'read 0 512' {}", kSecrets, image("disk", "sec1"))), 0);
}

INSTANTIATE_TEST_SUITE_P(Ciphers, LuksInterchange, testing::ValuesIn(kCases),
                         [](const auto& p) { return std::string(p.param.name); });

TEST_F(LuksInterchange, ConvertAndCompareOfQemuAgree) {
  const auto bytes = random_bytes(kDisk, 11);
  files_.write("plain.raw", {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  on_fiber([&] {
    create("ours", options(kDisk));
    Handle disk = open("ours");
    write_bytes(disk, 0, bytes);
    close(disk);
  });
  must(fmt::format(
      "qemu-img compare {} --image-opts driver=raw,file.driver=file,file.filename={} {}", kSecrets,
      path("plain.raw"), image("ours").substr(13)));
  qemu_with_clock(fmt::format("qemu-img convert {} -O luks -o key-secret=sec0,iter-time=10 {} {}",
                              kSecrets, path("plain.raw"), path("theirs")));
  on_fiber([&] {
    Handle disk = open("theirs", false);
    EXPECT_TRUE(read_bytes(disk, 0, kDisk) == bytes);
    close(disk);
  });
}

class LuksCryptsetup : public LuksTest {
 protected:
  void SetUp() override {
    if (run("command -v cryptsetup") != 0) GTEST_SKIP() << "cryptsetup is missing";
    for (int i = 0; i < 4; ++i) {
      files_.write(fmt::format("key{}", i), fmt::format("password {}", i));
    }
  }
  // True if the password of sec<i> opens it. (Mapping needs the kernel's dm-crypt; trying a
  // password does not.)
  bool cryptsetup_opens(const std::string& name, int i) {
    return run(fmt::format("cryptsetup open --test-passphrase --key-file {} {}",
                           path(fmt::format("key{}", i)), path(name))) == 0;
  }
};

TEST_F(LuksCryptsetup, TakesOurHeadersAndChangesThem) {
  on_fiber([&] { create("ours", options(kMiB)); });
  ASSERT_EQ(run("cryptsetup isLuks --type luks1 " + path("ours")), 0);
  ASSERT_EQ(run("cryptsetup luksDump " + path("ours")), 0) << last_output_;
  EXPECT_NE(last_output_.find("Key Slot 0: ENABLED"), std::string::npos) << last_output_;
  EXPECT_NE(last_output_.find("xts-plain64"), std::string::npos);
  EXPECT_TRUE(cryptsetup_opens("ours", 0)) << last_output_;
  EXPECT_FALSE(cryptsetup_opens("ours", 1));
  // cryptsetup finds our key slot, and adds one that we open.
  ASSERT_EQ(
      run(fmt::format("cryptsetup -q luksAddKey --pbkdf-force-iterations 1000 --key-file {} {} {}",
                      path("key0"), path("ours"), path("key1"))),
      0)
      << last_output_;
  on_fiber([&] { EXPECT_TRUE(opens("ours", "sec1")); });
  ASSERT_EQ(run(fmt::format("cryptsetup -q luksRemoveKey {} {}", path("ours"), path("key0"))), 0)
      << last_output_;
  on_fiber([&] {
    EXPECT_FALSE(opens("ours", "sec0"));
    Handle disk = open("ours", true, "", "sec1");
    amend("state=active,new-secret=sec2,iter-time=1");
    close(disk);
  });
  EXPECT_TRUE(cryptsetup_opens("ours", 2)) << last_output_;
}

TEST_F(LuksCryptsetup, ItsImagesAreOpened) {
  for (const char* kind : {"", "--cipher aes-cbc-essiv:sha256 --key-size 256",
                           "--cipher aes-xts-plain64 --key-size 256",
                           "--cipher aes-cbc-plain64 --key-size 192", "--hash sha512"}) {
    SCOPED_TRACE(kind);
    files_.write("theirs", "");
    std::filesystem::resize_file(path("theirs"), 4 * kMiB);
    ASSERT_EQ(run(fmt::format(
                  "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 {} {} {}",
                  kind, path("theirs"), path("key0"))),
              0)
        << last_output_;
    on_fiber([&] {
      EXPECT_TRUE(opens("theirs", "sec0"));
      EXPECT_FALSE(opens("theirs", "sec1"));
      Handle disk = open("theirs");
      const auto bytes = random_bytes(kMiB, 12);
      write_bytes(disk, 0, bytes);
      EXPECT_TRUE(read_bytes(disk, 0, kMiB) == bytes);
      amend("state=active,new-secret=sec1,iter-time=1");
      amend("state=inactive,old-secret=sec0");
      close(disk);
    });
    EXPECT_TRUE(cryptsetup_opens("theirs", 1)) << last_output_;
    EXPECT_FALSE(cryptsetup_opens("theirs", 0));
  }
}

// Its key material ends within a sector, which QEMU cannot do.
TEST_F(LuksCryptsetup, TakesKeysOf192Bits) {
  on_fiber([&] { create("ours", options(kMiB, ",cipher-alg=aes-192,cipher-mode=cbc")); });
  EXPECT_TRUE(cryptsetup_opens("ours", 0)) << last_output_;
  EXPECT_FALSE(cryptsetup_opens("ours", 1));
}

TEST_F(LuksCryptsetup, AHashThatTheLibraryLacksIsNamed) {
  files_.write("theirs", "");
  std::filesystem::resize_file(path("theirs"), 4 * kMiB);
  ASSERT_EQ(
      run(fmt::format(
          "cryptsetup -q luksFormat --type luks1 --pbkdf-force-iterations 1000 --hash ripemd160 "
          "{} {}",
          path("theirs"), path("key0"))),
      0)
      << last_output_;
  const std::string text = on_fiber([&] {
    return error_text([&] {
      Handle disk = open("theirs");
      close(disk);
    });
  });
  // Some versions of GnuTLS have it.
  EXPECT_TRUE(text.empty() || text.find("'ripemd160'") != std::string::npos) << text;
}

TEST_F(LuksCryptsetup, Luks2IsNamed) {
  files_.write("theirs", "");
  std::filesystem::resize_file(path("theirs"), 20 * kMiB);
  ASSERT_EQ(run(fmt::format("cryptsetup -q luksFormat --type luks2 --pbkdf pbkdf2 "
                            "--pbkdf-force-iterations 1000 {} {}",
                            path("theirs"), path("key0"))),
            0)
      << last_output_;
  on_fiber([&] {
    const std::string text = error_text([&] { open("theirs"); });
    EXPECT_NE(text.find("LUKS2"), std::string::npos) << text;
  });
}

}  // namespace
}  // namespace minivmm::block
