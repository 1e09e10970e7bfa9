// SPDX-License-Identifier: Apache-2.0
// External data files: guest data lies in another file where the guest has it; a raw one is the
// guest's disk by itself at any time.
#include <cstring>

#include "block/formats/qcow2/check.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint64_t kDisk = 3 << 20;

class Qcow2DataFile : public Qcow2Test {
 protected:
  static Bytes filled(uint64_t length, int value) {
    return Bytes(length, static_cast<std::byte>(value));
  }
  // QEMU takes the recorded name relative to where it runs.
  std::string in_place() const { return "cd " + directory_ + " && "; }
  void must(const std::string& command) { ASSERT_EQ(run(command), 0) << command << last_output_; }

  void create_with_data(const std::string& name, qcow2::CreateOptions options) {
    options.data_file = name + ".data";
    std::ofstream(path(name)).close();
    std::ofstream(path(options.data_file)).close();
    on_fiber([&] {
      graph_.add(Options::from_keys("driver=file,node-name=new,filename=" + path(name)));
      graph_.add(
          Options::from_keys("driver=file,node-name=data,filename=" + path(options.data_file)));
      {
        Edge file(graph_.find("new"), "create", Permissions::format_file(true));
        Edge data(graph_.find("data"), "create", Permissions::format_file(true));
        qcow2::create_image(file, options, &data);
      }
      graph_.remove("new");
      graph_.remove("data");
    });
  }
  Bytes file_content(const std::string& name) {
    std::ifstream in(path(name), std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
  }
  // A random change, made to the model as well.
  void change(Handle& disk, Bytes& model, std::mt19937_64& random) {
    const uint64_t offset = random() % (kDisk - 200'000);
    const uint64_t length = 1 + random() % 200'000;
    const int value = 1 + static_cast<int>(random() % 200);
    const auto kind = random() % 5;
    if (kind < 3) {
      write_bytes(disk, offset, filled(length, value));
      std::memset(model.data() + offset, value, length);
    } else if (kind == 3) {
      disk.write_zeroes(offset, length, {.may_unmap = random() % 2 == 0});
      std::memset(model.data() + offset, 0, length);
    } else {
      constexpr uint64_t kCluster = 65536;
      const uint64_t first = (offset + kCluster - 1) / kCluster * kCluster;
      const uint64_t end = (offset + length) / kCluster * kCluster;
      disk.discard(offset, length);
      if (first < end) std::memset(model.data() + first, 0, end - first);
    }
  }
  void expect_model(const std::string& name, const Bytes& model) {
    std::ofstream(path("model"), std::ios::binary)
        .write(reinterpret_cast<const char*>(model.data()),
               static_cast<std::streamsize>(model.size()));
    on_fiber([&] {
      Handle disk = open(name, false);
      EXPECT_TRUE(read_bytes(disk, 0, kDisk) == model);
      close(disk);
    });
  }
};

TEST_F(Qcow2DataFile, HoldsTheGuestsDataAndTheImageOnlyTables) {
  for (const bool raw : {false, true}) {
    for (const bool extended : {false, true}) {
      const uint64_t seed = std::random_device{}();
      SCOPED_TRACE(fmt::format("raw {}, extended {}, seed {}", raw, extended, seed));
      std::mt19937_64 random(seed);
      create_with_data("d.qcow2", {.size = kDisk, .extended_l2 = extended, .data_file_raw = raw});
      Bytes model(kDisk);
      for (int round = 0; round < 3; ++round) {
        on_fiber([&] {
          Handle disk = open("d.qcow2");
          for (int i = 0; i < 40; ++i) change(disk, model, random);
          EXPECT_TRUE(read_bytes(disk, 0, kDisk) == model);
          close(disk);
        });
        expect_model("d.qcow2", model);
        EXPECT_TRUE(!raw || file_content("d.qcow2.data") == model);
        EXPECT_LT(std::filesystem::file_size(path("d.qcow2")), 1U << 20);
        if (have_qemu()) {
          must(in_place() + "qemu-img check d.qcow2");
          must(in_place() + "qemu-img compare -f qcow2 -F raw d.qcow2 model");
        }
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(Qcow2DataFile, TakesTurnsWithQemu) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  const std::string cd = in_place();
  for (const char* options : {"data_file_raw=on", "data_file_raw=off", "extended_l2=on",
                              "data_file_raw=on,extended_l2=on", "preallocation=metadata"}) {
    SCOPED_TRACE(options);
    must(fmt::format("{}qemu-img create -f qcow2 -o data_file=data,{} t.qcow2 {}", cd, options,
                     kDisk));
    Bytes model(kDisk);
    for (int round = 0; round < 4; ++round) {
      on_fiber([&] {
        Handle disk = open("t.qcow2");
        for (int i = 0; i < 20; ++i) change(disk, model, random);
        close(disk);
      });
      std::string command = cd + "qemu-io -d unmap";
      for (int i = 0; i < 15; ++i) {
        const uint64_t offset = random() % (kDisk - 70'000) / 512 * 512;
        const uint64_t length = (1 + random() % 130) * 512;
        const int value = 1 + static_cast<int>(random() % 200);
        const bool zero = i % 3 == 2;
        command +=
            zero ? fmt::format(" -c 'write -z {}{} {}'", i % 2 == 0 ? "-u " : "", offset, length)
                 : fmt::format(" -c 'write -P {} {} {}'", value, offset, length);
        std::memset(model.data() + offset, zero ? 0 : value, length);
      }
      must(command + " t.qcow2");
      must(cd + "qemu-img check t.qcow2");
      expect_model("t.qcow2", model);
      must(cd + "qemu-img compare -f qcow2 -F raw t.qcow2 model");
      if (std::string(options).find("raw=on") != std::string::npos) {
        EXPECT_TRUE(file_content("data") == model);
      }
      if (HasFailure()) return;
    }
  }
}

// The bit promises that the data file can be read without us; it stays, others go.
TEST_F(Qcow2DataFile, TheRawBitSurvivesWriting) {
  create_with_data("d.qcow2", {.size = kDisk, .data_file_raw = true});
  {
    std::fstream file(path("d.qcow2"), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(qcow2::kAutoclearField);
    file.put(1);  // an autoclear bit that nobody knows
  }
  on_fiber([&] {
    Handle disk = open("d.qcow2");
    write_bytes(disk, 0, filled(100, 1));
    close(disk);
  });
  std::ifstream in(path("d.qcow2"), std::ios::binary);
  in.seekg(qcow2::kAutoclearField);
  std::string field(8, '\1');
  in.read(field.data(), 8);
  EXPECT_EQ(field, std::string("\0\0\0\0\0\0\0\2", 8));
}

// A discarded cluster gives its space in the data file back, and shows zeroes and not the base.
TEST_F(Qcow2DataFile, DiscardMakesHolesInIt) {
  std::ofstream(path("base")) << std::string(100'000, 'x');
  create_with_data("d.qcow2", {.size = kDisk, .backing_file = "base", .backing_format = "raw"});
  on_fiber([&] {
    Handle disk = open("d.qcow2");
    EXPECT_EQ(read_bytes(disk, 70'000, 10), filled(10, 'x'));
    write_bytes(disk, 0, filled(kDisk, 1));
    disk.discard(0, kDisk / 2);
    EXPECT_EQ(read_bytes(disk, 70'000, 10), filled(10, 0));
    write_bytes(disk, 70'000, filled(10, 2));
    EXPECT_EQ(read_bytes(disk, 69'000, 1000), filled(1000, 0));
    EXPECT_EQ(read_bytes(disk, kDisk / 2, 10), filled(10, 1));
    close(disk);
  });
  const Bytes data = file_content("d.qcow2.data");
  EXPECT_TRUE(std::all_of(data.begin() + 200'000, data.begin() + kDisk / 2,
                          [](std::byte b) { return b == std::byte{0}; }));
  if (have_qemu()) must(in_place() + "qemu-img check d.qcow2");
}

TEST_F(Qcow2DataFile, IsFlushedBeforeWhatPointsToIt) {
  on_fiber([&] {
    auto file = std::make_shared<TestFile>();
    auto data = std::make_shared<TestFile>();
    const qcow2::CreateOptions options{.size = kDisk, .data_file = "d"};
    {
      Edge edge(file, "create", Permissions::format_file(true));
      Edge data_edge(data, "create", Permissions::format_file(true));
      qcow2::create_image(edge, options, &data_edge);
    }
    auto node = open_test_image(file, nullptr, false, 1 << 20, data);
    std::vector<std::string> events;
    data->before = [&](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kFlush) events.push_back("data flush");
    };
    {
      Edge disk(node, "guest", Permissions::front_end(true));
      const Bytes bytes = filled(65536, 1);
      disk.write(0, base::SingleBuffer(std::span<const std::byte>(bytes)));
      file->before = [&](TestFile::Op op, uint64_t, uint64_t) {
        if (op == TestFile::Op::kWrite) events.push_back("table");
      };
      disk.flush();
    }
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.front(), "data flush");
    EXPECT_NE(std::find(events.begin(), events.end(), "table"), events.end());
    file->before = nullptr;
    data->before = nullptr;
    node->close();
  });
}

TEST_F(Qcow2DataFile, MustBeNamedWhereTheImageDoesNot) {
  create_with_data("d.qcow2", {.size = kDisk});
  std::filesystem::rename(path("d.qcow2.data"), path("moved"));
  on_fiber([&] {
    EXPECT_NE(error_text([&] { open("d.qcow2"); }).find("d.qcow2.data"), std::string::npos);
    Handle disk =
        open("d.qcow2", true, ",data-file.driver=file,data-file.filename=" + path("moved"));
    write_bytes(disk, 5, filled(10, 1));
    EXPECT_EQ(read_bytes(disk, 5, 10), filled(10, 1));
    close(disk);
  });
  create("plain.qcow2", {.size = kDisk});
  on_fiber([&] {
    EXPECT_NE(error_text([&] {
                open("plain.qcow2", true,
                     ",data-file.driver=file,data-file.filename=" + path("moved"));
              }).find("can only be set"),
              std::string::npos);
  });
}

// An image is not trusted to choose any file of the host.
TEST_F(Qcow2DataFile, IsFollowedOnlyWhereBackingFilesAre) {
  create_with_data("d.qcow2", {.size = kDisk});
  std::filesystem::create_directory(path("sub"));
  std::filesystem::rename(path("d.qcow2.data"), path("outside"));
  for (const std::string& name : {path("outside"), std::string("../outside"),
                                  std::string("nbd://host/x"), std::string("/etc/hostname")}) {
    create("sub/e.qcow2", {.size = kDisk, .data_file = name});
    on_fiber([&] {
      EXPECT_NE(error_text([&] { open("sub/e.qcow2"); }).find("data-file.filename=FILE"),
                std::string::npos)
          << name;
    });
  }
}

}  // namespace
}  // namespace minivmm::block
