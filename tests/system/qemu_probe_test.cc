// SPDX-License-Identifier: Apache-2.0
// The probe guest under QEMU microvm, with QEMU's virtio-blk. Slow (an emulated CPU), so each test
// does little.
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "tests/system/probe_text.h"
#include "tests/system/qemu_guest.h"
#include "tests/system/stress_check.h"

namespace minivmm::test {
namespace {

class QemuProbeTest : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = uint64_t{8} << 20;

  void SetUp() override {
    if (!qemu_exists()) GTEST_SKIP() << "no qemu-system-x86_64";
    std::string pattern = (std::filesystem::temp_directory_path() / "minivmm-qemu-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    path_ = folder_ / "disk.raw";
    std::ofstream(path_).close();
    std::filesystem::resize_file(path_, kBytes);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string bytes_at(uint64_t offset, size_t size) {
    std::string out(size, '\0');
    std::ifstream file(path_, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(out.data(), static_cast<std::streamsize>(size));
    return out;
  }

  std::filesystem::path folder_;
  std::filesystem::path path_;
};

TEST_F(QemuProbeTest, WritesArriveInTheFile) {
  const auto result = run_qemu(
      "job=info,write:0xa5:offset=1M:length=64K,verify:0xa5:offset=1M:length=64K,flush,"
      "zero:offset=1040K:length=8K,discard:offset=2M:length=1M,write:text=from-the-guest,"
      "errors,wce:off",
      qemu_disk(path_.string(), ",serial=under-test"), 60);
  EXPECT_EQ(result.status, 0) << result.output;
  EXPECT_NE(result.output.find("id=\"under-test\""), std::string::npos) << result.output;
  EXPECT_EQ(bytes_at(1 << 20, 16384), std::string(16384, '\xa5'));
  EXPECT_EQ(bytes_at(1040 << 10, 8192), std::string(8192, '\0'));
  EXPECT_EQ(bytes_at(1048 << 10, 4096), std::string(4096, '\xa5'));
  EXPECT_EQ(bytes_at((1 << 20) - 1, 1), std::string(1, '\0'));
  EXPECT_EQ(bytes_at(0, 14), "from-the-guest");
}

TEST_F(QemuProbeTest, VerifyFindsOneWrongByte) {
  {
    std::ofstream file(path_, std::ios::binary | std::ios::in);
    file.seekp(5000000);
    file.put('x');
  }
  const auto result = run_qemu("job=verify:zero", qemu_disk(path_.string()), 60);
  EXPECT_EQ(result.status, 1) << result.output;
  const auto lines = results(result.output, "verify");
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_EQ(lines[0].number("first_wrong"), 5000000u);
  EXPECT_EQ(lines[0].number("wrong_sectors"), 1u);
}

TEST_F(QemuProbeTest, ReadOnlyDisksAreRefused) {
  auto arguments = qemu_disk(path_.string());
  arguments[1] += ",readonly=on";
  const auto result = run_qemu("job=write,write:force,errors", arguments, 60);
  EXPECT_EQ(result.status, 1) << result.output;
  const auto writes = results(result.output, "write");
  ASSERT_EQ(writes.size(), 2u) << result.output;
  EXPECT_EQ(writes[0].value("error"), "disk is read-only");
  EXPECT_EQ(writes[1].value("error"), "device reported an I/O error");
  EXPECT_TRUE(results(result.output, "errors").at(0).ok) << result.output;
}

TEST_F(QemuProbeTest, LegacyDevicesAreNamed) {
  auto arguments = qemu_disk(path_.string());
  arguments.insert(arguments.end(), {"-global", "virtio-mmio.force-legacy=true"});
  const auto result = run_qemu("job=info", arguments, 60);
  EXPECT_EQ(result.status, 1);
  EXPECT_NE(result.output.find("force-legacy=false"), std::string::npos) << result.output;
}

TEST_F(QemuProbeTest, ShellTakesCommandsFromTheSerialPort) {
  const auto result = run_qemu("job=shell", qemu_disk(path_.string()), 60,
                               "write 0x11 length=4096\nverify 0x12 length=4096\nexit 3\n");
  EXPECT_EQ(result.status, 3) << result.output;
  EXPECT_TRUE(results(result.output, "write").at(0).ok) << result.output;
  EXPECT_FALSE(results(result.output, "verify").at(0).ok) << result.output;
}

struct StressCase {
  const char* name;
  const char* words;
  const char* options;
  const char* device;
};

class QemuStressTest : public QemuProbeTest, public testing::WithParamInterface<StressCase> {};

TEST_P(QemuStressTest, LeavesExactlyWhatItWrote) {
  const StressCase& test = GetParam();
  const auto result = run_qemu(
      std::string(test.words) + " job=stress:23:20:count=600:zeroes:discards:log" + test.options,
      qemu_disk(path_.string(), test.device), 100);
  EXPECT_EQ(result.status, 0) << result.output;
  const auto lines = results(result.output, "stress");
  ASSERT_EQ(lines.size(), 1u) << result.output;
  EXPECT_NE(result.output.find("probe: flushed disk=0 sequence=600\n"), std::string::npos);
  StressCheck check;
  check.parameters.seed = 23;
  check.parameters.blocks = kBytes / 4096;
  check.parameters.zeroes = true;
  check.parameters.discards = true;
  check.durable = check.issued = lines[0].number("last");
  check.started_empty = true;
  const auto problems = check_stress(check, read_file(path_.string()));
  EXPECT_TRUE(problems.empty()) << problems.front();
}

INSTANTIATE_TEST_SUITE_P(
    Ways, QemuStressTest,
    testing::Values(StressCase{"interrupts", "", ":depth=16", ""},
                    StressCase{"polling", "", ":depth=16:poll", ""},
                    StressCase{"direct_descriptors", "", ":depth=16:indirect=off:segments=5", ""},
                    StressCase{"no_event_idx", "disable=event_idx", ":depth=16", ""},
                    StressCase{"three_queues", "", ":depth=16", ",num-queues=3"}),
    [](const auto& way) { return std::string(way.param.name); });

}  // namespace
}  // namespace minivmm::test
