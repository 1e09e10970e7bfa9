// SPDX-License-Identifier: Apache-2.0
// Passwords added and erased; what is refused; what a loss of power in between leaves.
#include <algorithm>

#include "base/io.h"
#include "luks_fixture.h"
#include "write_log.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kDisk = 64 * 1024;

class LuksAmend : public LuksTest {
 protected:
  std::string amend_error(const std::string& keys, bool force = false) {
    return error_text([&] { amend(keys, force); });
  }
  std::vector<bool> who_opens(const std::string& name) {
    std::vector<bool> out;
    for (int i = 0; i < 4; ++i) out.push_back(opens(name, fmt::format("sec{}", i)));
    return out;
  }
};

using Opens = std::vector<bool>;

TEST_F(LuksAmend, PasswordsAreAddedAndErased) {
  on_fiber([&] {
    create("disk", options(kDisk));
    Handle disk = open("disk");
    const auto bytes = random_bytes(kDisk, 3);
    write_bytes(disk, 0, bytes);
    amend("state=active,new-secret=sec1,iter-time=1");
    amend("state=active,new-secret=sec2,iter-time=1,keyslot=6");  // its entry straddles two sectors
    amend("state=active,new-secret=sec2,iter-time=1");
    close(disk);
    EXPECT_EQ(who_opens("disk"), (Opens{true, true, true, false}));
    disk = open("disk", true, "", "sec2");
    amend("state=inactive,old-secret=sec0");
    EXPECT_TRUE(read_bytes(disk, 0, kDisk) == bytes) << "the key that is in use stays";
    amend("state=inactive,keyslot=1");
    close(disk);
    EXPECT_EQ(who_opens("disk"), (Opens{false, false, true, false}));
    disk = open("disk", true, "", "sec2");
    EXPECT_TRUE(read_bytes(disk, 0, kDisk) == bytes);
    // Both slots have it, and they are the last.
    EXPECT_NE(amend_error("state=inactive,old-secret=sec2").find("All the active keyslots match"),
              std::string::npos);
    amend("state=active,new-secret=sec3,iter-time=1");  // slot 0 is free again
    amend("state=inactive,old-secret=sec2");
    close(disk);
    EXPECT_EQ(who_opens("disk"), (Opens{false, false, false, true}));
  });
}

TEST_F(LuksAmend, TheLastPasswordGoesOnlyByForce) {
  on_fiber([&] {
    create("disk", options(kDisk));
    Handle disk = open("disk");
    EXPECT_NE(amend_error("state=inactive,keyslot=0").find("only active keyslot 0"),
              std::string::npos);
    EXPECT_NE(amend_error("state=inactive,old-secret=sec0").find("refusing operation"),
              std::string::npos);
    close(disk);
    EXPECT_EQ(who_opens("disk"), (Opens{true, false, false, false}));
    disk = open("disk");
    amend("state=inactive,keyslot=0", true);
    close(disk);
    const std::string text = error_text([&] { open("disk"); });
    EXPECT_NE(text.find("every key slot was erased"), std::string::npos) << text;
  });
}

TEST_F(LuksAmend, WhatCannotBeMeantIsRefused) {
  on_fiber([&] {
    create("disk", options(kDisk));
    Handle disk = open("disk");
    const std::string before = files_.read("disk");
    const std::pair<const char*, const char*> cases[] = {
        {"new-secret=sec1", "'state' is missing"},
        {"state=gone", "state=gone"},
        {"state=active", "'new-secret' is required"},
        {"state=active,new-secret=sec1,old-secret=sec0", "'old-secret' must not be given"},
        {"state=active,new-secret=sec1,keyslot=8", "8"},
        {"state=active,new-secret=sec1,keyslot=0", "Refusing to overwrite active keyslot 0"},
        {"state=active,new-secret=nobody", "No secret with id 'nobody'"},
        {"state=active,new-secret=sec1,iter-time=0", "iter-time"},
        {"state=inactive", "To erase keyslot(s), either explicit keyslot"},
        {"state=inactive,keyslot=0,new-secret=sec1", "'new-secret' must not be given"},
        {"state=inactive,keyslot=0,iter-time=5", "'iter-time' must not be given"},
        {"state=inactive,keyslot=5", "already erased"},
        {"state=inactive,keyslot=0,old-secret=sec1", "doesn't contain the given old password"},
        {"state=inactive,old-secret=sec1", "No keyslots match"},
    };
    for (const auto& [keys, says] : cases) {
      const std::string text = amend_error(keys);
      EXPECT_NE(text.find(says), std::string::npos) << keys << ": " << text;
    }
    EXPECT_TRUE(files_.read("disk") == before) << "what was refused has changed nothing";
    for (int i = 0; i < 7; ++i) amend("state=active,new-secret=sec1,iter-time=1");
    EXPECT_NE(amend_error("state=active,new-secret=sec1").find("all keyslots are in use"),
              std::string::npos);
    amend("state=active,new-secret=sec3,keyslot=2,iter-time=1", true);
    close(disk);
    EXPECT_EQ(who_opens("disk"), (Opens{true, true, false, true}));
  });
}

TEST_F(LuksAmend, AnErasedSlotsKeyMaterialIsGone) {
  on_fiber([&] {
    create("disk", options(kDisk));
    Handle disk = open("disk");
    amend("state=active,new-secret=sec1,iter-time=1");
    const std::string before = files_.read("disk");
    amend("state=inactive,keyslot=1");
    close(disk);
    const std::string after = files_.read("disk");
    const size_t at = 262144;
    const size_t size = 256000;
    size_t same = 0;
    for (size_t i = at; i < at + size; ++i) same += before[i] == after[i] ? 1 : 0;
    EXPECT_LT(same, size / 100);  // one in 256 by chance
    // Nor does it help to declare it active again.
    std::string forged = before;
    std::copy_n(after.begin() + static_cast<ptrdiff_t>(at), size,
                forged.begin() + static_cast<ptrdiff_t>(at));
    files_.write("forged", forged);
    EXPECT_EQ(who_opens("forged"), (Opens{true, false, false, false}));
  });
}

// Cuts the log of an amend at each entry, several states each: with parts of what was not flushed,
// sectors torn out of order.
class LuksPowerLoss : public LuksAmend {
 protected:
  static std::vector<std::byte> bytes_in(const std::string& text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
  }
  static std::string text_in(const std::vector<std::byte>& bytes) {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  // `check(opens, done)`: done when the log was not cut.
  template <typename Check>
  void run_cut(const std::string& keys, Check&& check) {
    const std::string start = files_.read("disk");
    files_.write("log", "");
    on_fiber([&] {
      graph_.add(Options::from_keys(fmt::format(
          "driver=luks,node-name=disk,key-secret=sec0,file.driver=log-writes,"
          "file.log.driver=file,file.log.filename={},file.file.driver=file,file.file.filename={}",
          path("log"), path("disk"))));
      Handle disk = graph_.attach("disk", "test", Permissions::front_end(true));
      amend(keys);
      close(disk);
    });
    const WriteLog log(bytes_in(files_.read("log")));
    const uint64_t seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937_64 random(seed);
    size_t states = 0;
    for (size_t cut = 0; cut <= log.entries().size(); ++cut) {
      for (int i = 0; i < 6; ++i, ++states) {
        files_.write("cut", text_in(log.after_power_loss(bytes_in(start), cut, random)));
        const Opens opens = on_fiber([&] { return who_opens("cut"); });
        SCOPED_TRACE(fmt::format("cut {} of {}", cut, log.entries().size()));
        EXPECT_TRUE(opens[0]) << "a password that was not touched";
        check(opens, cut == log.entries().size());
      }
    }
    EXPECT_GE(log.entries().size(), 5U) << "the log has writes and flushes";
  }
};

TEST_F(LuksPowerLoss, AddingKeepsTheOthersAndIsWholeOrNot) {
  for (const char* slot : {"1", "6"}) {
    on_fiber([&] { create("disk", options(kDisk)); });
    run_cut(fmt::format("state=active,new-secret=sec1,iter-time=1,keyslot={}", slot),
            [&](const Opens& opens, bool done) {
              EXPECT_TRUE(opens[1] || !done) << "it was flushed";
              // An active slot opens: one that is half there does not show.
              const auto header = crypto::parse_luks1(bytes_of(files_.read("cut")));
              EXPECT_EQ(header.slots[static_cast<size_t>(std::stoi(slot))].active, opens[1]);
            });
  }
}

TEST_F(LuksPowerLoss, ErasingKeepsTheOthersAndWhatIsInactiveIsErased) {
  on_fiber([&] {
    create("disk", options(kDisk));
    Handle disk = open("disk");
    amend("state=active,new-secret=sec1,iter-time=1,keyslot=6");
    close(disk);
  });
  const std::string whole = files_.read("disk");
  run_cut("state=inactive,keyslot=6", [&](const Opens& opens, bool done) {
    EXPECT_FALSE(opens[1] && done);
    std::string cut = files_.read("cut");
    if (crypto::parse_luks1(bytes_of(cut)).slots[6].active) return;
    // Given its old entry back, it opens nothing.
    std::copy_n(whole.begin(), crypto::kLuks1HeaderSize, cut.begin());
    files_.write("forged", cut);
    EXPECT_FALSE(on_fiber([&] { return this->opens("forged", "sec1"); }));
  });
}

}  // namespace
}  // namespace minivmm::block
