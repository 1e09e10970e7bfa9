// SPDX-License-Identifier: Apache-2.0
// Headers that lie: each is an error that says what is wrong, at once and without much memory.
#include <sys/resource.h>

#include <array>
#include <chrono>
#include <cstring>
#include <functional>

#include "base/bytes.h"
#include "block/crypto/kdf.h"
#include "luks_fixture.h"

namespace minivmm::block {
namespace {

using crypto::kLuks1SlotAt;
using crypto::kLuks1SlotSize;

constexpr uint64_t kDisk = 64 * 1024;

class LuksHostile : public LuksTest {
 protected:
  LuksHostile() {
    on_fiber([&] { create("good", options(kDisk)); });
    good_ = files_.read("good");
  }
  // Opens a copy in which `change` was made; the text of the error.
  std::string error_after(const std::function<void(std::string&)>& change) {
    std::string bytes = good_;
    change(bytes);
    files_.write("bad", bytes);
    const auto before = std::chrono::steady_clock::now();
    const std::string text = on_fiber([&] {
      return error_text([&] {
        Handle disk = open("bad");
        close(disk);
      });
    });
    EXPECT_LT(std::chrono::steady_clock::now() - before, std::chrono::seconds(2)) << text;
    return text;
  }
  static void put16(std::string& bytes, size_t at, uint16_t value) {
    base::store_be(bytes.data() + at, value);
  }
  static void put(std::string& bytes, size_t at, uint32_t value) {
    base::store_be(bytes.data() + at, value);
  }
  static uint32_t get(const std::string& bytes, size_t at) {
    return base::load_be<uint32_t>(bytes.data() + at);
  }
  static size_t slot(size_t number) { return kLuks1SlotAt + number * kLuks1SlotSize; }

  std::string good_;
};

TEST_F(LuksHostile, WrongHeadersAreRefusedByWhatIsWrong) {
  struct Case {
    const char* name;
    std::function<void(std::string&)> change;
    const char* says;
  };
  const auto text = [](size_t at, std::string_view value) {
    return [=](std::string& b) {
      std::memset(b.data() + at, 0, 32);
      std::memcpy(b.data() + at, value.data(), value.size());
    };
  };
  const auto number = [](size_t at, uint32_t value) {
    return [=](std::string& b) { put(b, at, value); };
  };
  const Case cases[] = {
      {"empty", [](std::string& b) { b.clear(); }, "no LUKS header"},
      {"magic", [](std::string& b) { b[5] = 'x'; }, "no LUKS header"},
      {"cut", [](std::string& b) { b.resize(300); }, "cut off"},
      {"LUKS2", [](std::string& b) { put16(b, 6, 2); }, "LUKS2"},
      {"version", [](std::string& b) { put16(b, 6, 513); }, "513"},
      {"cipher", text(8, "twofish"), "'twofish'"},
      {"cipher of wild bytes", text(8, "\x1b[2J"), "no text"},
      {"cipher without end", [](std::string& b) { std::memset(b.data() + 8, 'a', 32); }, "no end"},
      {"mode", text(40, "lrw-plain64"), "'lrw'"},
      {"mode without IV", text(40, "xts"), "without an IV"},
      {"IV", text(40, "xts-lmk"), "'lmk'"},
      {"essiv without hash", text(40, "cbc-essiv"), "lacks the hash"},
      {"essiv with a hash that is no key", text(40, "xts-essiv:sha1"), "no AES key"},
      {"hash", text(72, "md4"), "'md4'"},
      {"no hash", text(72, ""), "''"},
      {"key of 0", number(108, 0), "a key of 0"},
      {"key of 31", number(108, 31), "a key of 31"},
      {"key of 4 GiB", number(108, 0xffffffff), "a key of 4294967295"},
      {"payload behind the end", number(104, 0x7fffffff), "past the end"},
      {"payload at the last number", number(104, 0xffffffff), "past the end"},
      {"detached", number(104, 0), "detached"},
      {"payload in the header", number(104, 1), "reaches past the payload"},
      {"payload in the key material", number(104, 4000), "slot 7"},
      {"no iterations of the digest", number(164, 0), "no iterations"},
      {"UUID without end", [](std::string& b) { std::memset(b.data() + 168, 'a', 40); }, "UUID"},
      {"state", number(slot(3), 0xac71f2), "key slot 3"},
      {"no iterations", number(slot(0) + 4, 0), "key slot 0 has no iterations"},
      {"no stripes", number(slot(5) + 44, 0), "key slot 5 has 0 stripes"},
      {"stripes", number(slot(0) + 44, 0xffffffff), "4294967295 stripes"},
      {"stripes that wrap", number(slot(0) + 44, 0x4000001), "stripes"},
      {"material in the header", number(slot(2) + 40, 1), "slot 2 overlaps the header"},
      {"material behind the payload", number(slot(2) + 40, 0xffffffff), "slot 2"},
      {"material of two slots",
       [](std::string& b) { put(b, slot(2) + 40, get(b, slot(1) + 40) + 499); },
       "slots 1 and 2 overlap"},
      {"the same material", [](std::string& b) { put(b, slot(7) + 40, get(b, slot(0) + 40)); },
       "slots 0 and 7 overlap"},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const std::string said = error_after(c.change);
    EXPECT_NE(said.find(c.says), std::string::npos) << said;
    EXPECT_NE(said.find("bad"), std::string::npos) << "the file is named: " << said;
  }
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  EXPECT_LT(usage.ru_maxrss, 1L << 20) << "KiB";
}

// 2^32 iterations are an hour: what a slot costs is known before it is tried.
TEST_F(LuksHostile, SillyIterationCountsAreNotCounted) {
  for (const size_t at : {slot(0) + 4, size_t{164}}) {
    const std::string said = error_after([&](std::string& b) { put(b, at, 0xffffffff); });
    EXPECT_NE(said.find("key slot 0"), std::string::npos) << said;
    EXPECT_NE(said.find("4294967295"), std::string::npos) << said;
    EXPECT_NE(said.find("unlock-time"), std::string::npos) << said;
  }
  // All slots together are bounded, not each: eight slots of just below the limit are not tried.
  const std::string said = error_after([&](std::string& b) {
    for (size_t i = 0; i < 8; ++i) {
      put(b, slot(i), crypto::kLuksSlotActive);
      put(b, slot(i) + 4, 0xfffffff0);
    }
  });
  EXPECT_NE(said.find("unlock-time"), std::string::npos) << said;
}

// A silly slot does not keep a good one from being tried.
TEST_F(LuksHostile, SlotsBehindASillyOneAreTried) {
  on_fiber([&] {
    Handle disk = open("good");
    amend("state=active,new-secret=sec1,iter-time=1,keyslot=4");
    close(disk);
  });
  good_ = files_.read("good");
  std::string bytes = good_;
  put(bytes, slot(0) + 4, 0xffffffff);
  files_.write("bad", bytes);
  on_fiber([&] {
    EXPECT_TRUE(opens("bad", "sec1"));
    // But for a password that none of the tried opens, that one was not is what is said.
    EXPECT_EQ(error_number([&] { open("bad", true, "", "sec0"); }), ETIME);
  });
}

TEST_F(LuksHostile, ALimitThatIsGivenHolds) {
  std::string bytes = good_;
  // About 10 s: within the limit that holds otherwise, not within this one.
  const crypto::KdfSpeed speed(crypto::Hash::kSha256, crypto::KdfSpeed::Precision::kRough);
  put(bytes, slot(0) + 4, speed.iterations_in(std::chrono::seconds(10), 64));
  files_.write("bad", bytes);
  on_fiber([&] {
    EXPECT_EQ(error_number([&] { open("bad", true, ",unlock-time=1"); }), ETIME);
    EXPECT_EQ(error_number([&] { open("bad", true, ",unlock-time=0"); }), EINVAL);
  });
}

TEST_F(LuksHostile, RandomDamageIsAnErrorOrNone) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  for (int i = 0; i < 3000; ++i) {
    crypto::Luks1Bytes bytes;
    std::memcpy(bytes.data(), good_.data(), bytes.size());
    for (uint64_t n = random() % 4 + 1; n > 0; --n) {
      bytes[random() % bytes.size()] = static_cast<std::byte>(random());
    }
    try {
      const auto header = crypto::parse_luks1(bytes);
      crypto::check_luks1_place(header, {good_.size(), random() % 2 == 0});
      for (const auto& s : header.slots) {
        ASSERT_LE(s.material_offset() + header.key_size() * s.stripes, good_.size());
      }
    } catch (const base::Error&) {
    }
  }
}

TEST_F(LuksHostile, WhatIsParsedIsWrittenAgain) {
  const auto header = crypto::parse_luks1(bytes_of(good_));
  const crypto::Luks1Bytes again = crypto::encode_luks1(header);
  EXPECT_EQ(std::memcmp(again.data(), good_.data(), again.size()), 0);
}

}  // namespace
}  // namespace minivmm::block
