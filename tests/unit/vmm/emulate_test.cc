// SPDX-License-Identifier: Apache-2.0
// The instructions that are done in place of KVM: decoded and carried out, compared with what this
// processor does with the same bytes, registers and flags.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include <cpuid.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "tests/unit/vmm/elf_builder.h"
#include "vmm/emulate/execute.h"
#include "vmm/emulate/instruction.h"
#include "vmm/machine.h"

namespace minivmm::vmm::emulate {
namespace {

using base::load_le;
using base::store_le;
using Code = std::vector<uint8_t>;

class FakeFpu final : public FloatingPoint {
 public:
  kvm_fpu load() override { return state; }
  void store(const kvm_fpu& to) override { state = to; }
  kvm_fpu state{};
};

// A guest of 1 MiB whose first 64 KiB are mapped at kLinear, with a table of descriptors.
class ExecuteTest : public testing::Test {
 protected:
  static constexpr uint64_t kLinear = 0xffff800000000000;
  static constexpr uint64_t kGdt = kLinear + 0x8000;
  static constexpr uint64_t kPresentWritable = 3;

  ExecuteTest()
      : ram_(1 << 20), memory_({{0, ram_.size(), ram_.data()}}), cpu_{{}, {}, fpu_, memory_} {
    cpu_.sregs.efer = 0xd01;
    cpu_.sregs.cs.l = 1;
    cpu_.sregs.cr0 = 0x80050033;
    cpu_.sregs.cr3 = 0x10000;
    cpu_.sregs.cr4 = 0x6b0;
    cpu_.sregs.gdt = {kGdt, 0x2f, {}};
    cpu_.regs.rip = kLinear + 0x100;
    cpu_.regs.rflags = 2;
    entry(0x10000, 256) = 0x11000 | kPresentWritable;
    entry(0x11000, 0) = 0x12000 | kPresentWritable;
    entry(0x12000, 0) = 0x13000 | kPresentWritable;
    for (uint64_t i = 0; i < 16; ++i) entry(0x13000, i) = (i << 12) | kPresentWritable;
    const uint64_t descriptors[] = {0,
                                    0x00cf9b000000ffff,
                                    0x00af9b000000ffff,
                                    0x00cf93000000ffff,
                                    0x00008b0000000067,
                                    0x00cff3000000ffff};
    std::memcpy(&ram_[0x8000], descriptors, sizeof descriptors);
  }

  uint64_t& entry(uint64_t table, uint64_t index) {
    return *reinterpret_cast<uint64_t*>(&ram_[table + index * 8]);
  }
  Outcome run(const Code& code) { return execute(cpu_, code, exception_); }
  bool zero() const { return (cpu_.regs.rflags >> 6 & 1) != 0; }

  std::vector<std::byte> ram_;
  virtio::GuestMemory memory_;
  FakeFpu fpu_;
  Cpu cpu_;
  Exception exception_;
};

// --- Against this processor ---

struct HostRegisters {
  uint64_t rax, rcx, rdx, rbx, rsi, rdi, flags;
};

// Runs `code`, which touches these registers only.
class HostProcessor {
 public:
  HostProcessor() {
    page_ = static_cast<uint8_t*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  }
  ~HostProcessor() { ::munmap(page_, 4096); }
  HostProcessor(const HostProcessor&) = delete;
  HostProcessor& operator=(const HostProcessor&) = delete;

  void run(const Code& code, HostRegisters& r) {
    std::memcpy(page_, code.data(), code.size());
    page_[code.size()] = 0xc3;
    asm volatile(
        "sub $128, %%rsp\n"  // past what a leaf function keeps below the stack
        "push %[flags]\n popfq\n call *%[page]\n pushfq\n pop %[flags]\n"
        "lea 128(%%rsp), %%rsp\n"
        : "+a"(r.rax), "+c"(r.rcx), "+d"(r.rdx), "+b"(r.rbx), "+S"(r.rsi),
          "+D"(r.rdi), [flags] "+r"(r.flags)
        : [page] "r"(page_)
        : "memory", "cc");
  }

 private:
  uint8_t* page_;
};

constexpr uint64_t kCf = 1, kZf = 1 << 6, kSf = 1 << 7, kOf = 1 << 11;
constexpr uint64_t kAllFlags = 0x8d5;

struct Sample {
  const char* name;
  Code code;
  uint64_t flags;  // those that the architecture defines afterwards
  unsigned cpuid_leaf, cpuid_register, cpuid_bit;
};

bool host_has(const Sample& sample) {
  unsigned r[4] = {};
  return __get_cpuid_count(sample.cpuid_leaf, 0, &r[0], &r[1], &r[2], &r[3]) != 0 &&
         (r[sample.cpuid_register] >> sample.cpuid_bit & 1) != 0;
}

const std::vector<Sample>& samples() {
  constexpr unsigned kEbx = 1, kEcx = 2;
  constexpr uint64_t kKept = kAllFlags;  // instructions that change none keep all
  static const std::vector<Sample> all = {
      {"popcnt eax,ecx", {0xf3, 0x0f, 0xb8, 0xc1}, kAllFlags, 1, kEcx, 23},
      {"popcnt ax,cx", {0x66, 0xf3, 0x0f, 0xb8, 0xc1}, kAllFlags, 1, kEcx, 23},
      {"popcnt rdx,rsi", {0xf3, 0x48, 0x0f, 0xb8, 0xd6}, kAllFlags, 1, kEcx, 23},
      {"crc32 eax,cl", {0xf2, 0x0f, 0x38, 0xf0, 0xc1}, kKept, 1, kEcx, 20},
      {"crc32 eax,ch", {0xf2, 0x0f, 0x38, 0xf0, 0xc5}, kKept, 1, kEcx, 20},
      {"crc32 eax,sil", {0xf2, 0x40, 0x0f, 0x38, 0xf0, 0xc6}, kKept, 1, kEcx, 20},
      {"crc32 eax,cx", {0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc1}, kKept, 1, kEcx, 20},
      {"crc32 eax,ecx", {0xf2, 0x0f, 0x38, 0xf1, 0xc1}, kKept, 1, kEcx, 20},
      {"crc32 rax,rcx", {0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc1}, kKept, 1, kEcx, 20},
      {"adcx eax,ecx", {0x66, 0x0f, 0x38, 0xf6, 0xc1}, kAllFlags, 7, kEbx, 19},
      {"adcx rax,rcx", {0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc1}, kAllFlags, 7, kEbx, 19},
      {"adox rdx,rsi", {0xf3, 0x48, 0x0f, 0x38, 0xf6, 0xd6}, kAllFlags, 7, kEbx, 19},
      {"andn eax,ecx,edx", {0xc4, 0xe2, 0x70, 0xf2, 0xc2}, kCf | kZf | kSf | kOf, 7, kEbx, 3},
      {"andn rax,rcx,rdx", {0xc4, 0xe2, 0xf0, 0xf2, 0xc2}, kCf | kZf | kSf | kOf, 7, kEbx, 3},
      {"blsr eax,ecx", {0xc4, 0xe2, 0x78, 0xf3, 0xc9}, kCf | kZf | kSf | kOf, 7, kEbx, 3},
      {"blsmsk rax,rcx", {0xc4, 0xe2, 0xf8, 0xf3, 0xd1}, kCf | kZf | kSf | kOf, 7, kEbx, 3},
      {"blsi eax,ecx", {0xc4, 0xe2, 0x78, 0xf3, 0xd9}, kCf | kZf | kSf | kOf, 7, kEbx, 3},
      {"bextr eax,ecx,edx", {0xc4, 0xe2, 0x68, 0xf7, 0xc1}, kCf | kZf | kOf, 7, kEbx, 3},
      {"bextr rax,rcx,rdx", {0xc4, 0xe2, 0xe8, 0xf7, 0xc1}, kCf | kZf | kOf, 7, kEbx, 3},
      {"bzhi eax,ecx,edx", {0xc4, 0xe2, 0x68, 0xf5, 0xc1}, kCf | kZf | kSf | kOf, 7, kEbx, 8},
      {"bzhi rax,rcx,rdx", {0xc4, 0xe2, 0xe8, 0xf5, 0xc1}, kCf | kZf | kSf | kOf, 7, kEbx, 8},
      {"pext rax,rcx,rsi", {0xc4, 0xe2, 0xf2, 0xf5, 0xc6}, kKept, 7, kEbx, 8},
      {"pdep eax,ecx,esi", {0xc4, 0xe2, 0x73, 0xf5, 0xc6}, kKept, 7, kEbx, 8},
      {"mulx eax,ebx,ecx", {0xc4, 0xe2, 0x63, 0xf6, 0xc1}, kKept, 7, kEbx, 8},
      {"mulx rax,rax,rcx", {0xc4, 0xe2, 0xfb, 0xf6, 0xc1}, kKept, 7, kEbx, 8},
      {"shlx eax,ecx,edx", {0xc4, 0xe2, 0x69, 0xf7, 0xc1}, kKept, 7, kEbx, 8},
      {"sarx eax,ecx,edx", {0xc4, 0xe2, 0x6a, 0xf7, 0xc1}, kKept, 7, kEbx, 8},
      {"sarx rax,rcx,rdx", {0xc4, 0xe2, 0xea, 0xf7, 0xc1}, kKept, 7, kEbx, 8},
      {"shrx rax,rcx,rdx", {0xc4, 0xe2, 0xeb, 0xf7, 0xc1}, kKept, 7, kEbx, 8},
      {"rorx eax,ecx,7", {0xc4, 0xe3, 0x7b, 0xf0, 0xc1, 7}, kKept, 7, kEbx, 8},
      {"rorx rax,rcx,64", {0xc4, 0xe3, 0xfb, 0xf0, 0xc1, 64}, kKept, 7, kEbx, 8},
  };
  return all;
}

uint64_t interesting(std::mt19937_64& random) {
  switch (random() % 6) {
    case 0:
      return 0;
    case 1:
      return ~uint64_t{0};
    case 2:
      return uint64_t{1} << random() % 64;
    case 3:
      return random() & 0xffff;
    default:
      return random();
  }
}

TEST_F(ExecuteTest, ArithmeticIsWhatThisProcessorDoes) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  HostProcessor host;
  unsigned compared = 0;
  for (const Sample& sample : samples()) {
    if (!host_has(sample)) continue;
    ++compared;
    SCOPED_TRACE(sample.name);
    for (int i = 0; i < 500; ++i) {
      HostRegisters r{interesting(random),           interesting(random), interesting(random),
                      interesting(random),           interesting(random), interesting(random),
                      (random() & kAllFlags) | 0x202};
      auto& g = cpu_.regs;
      g.rax = r.rax, g.rcx = r.rcx, g.rdx = r.rdx, g.rbx = r.rbx, g.rsi = r.rsi, g.rdi = r.rdi;
      g.rflags = r.flags;
      const HostRegisters before = r;
      const uint64_t rip = g.rip;
      host.run(sample.code, r);
      Code code = sample.code;
      code.push_back(0x90);  // what follows is not the instruction's
      ASSERT_EQ(run(code), Outcome::kDone);
      ASSERT_EQ(g.rip, rip + sample.code.size());
      g.rip = rip;
      ASSERT_TRUE(g.rax == r.rax && g.rcx == r.rcx && g.rdx == r.rdx && g.rbx == r.rbx &&
                  g.rsi == r.rsi && g.rdi == r.rdi &&
                  (g.rflags & sample.flags) == (r.flags & sample.flags))
          << std::hex << "rax " << before.rax << " rcx " << before.rcx << " rdx " << before.rdx
          << " rsi " << before.rsi << " flags " << before.flags << ": here rax " << g.rax
          << " flags " << g.rflags << ", processor rax " << r.rax << " flags " << r.flags;
    }
  }
  if (compared == 0) GTEST_SKIP() << "this processor has none of them";
}

// --- Memory operands ---

TEST_F(ExecuteTest, FindsOperandsByEveryKindOfAddress) {
  store_le<uint32_t>(&ram_[0x2010], 0xf0f0);
  cpu_.regs.rbx = kLinear + 0x2000;
  cpu_.regs.r9 = kLinear;
  cpu_.regs.r12 = 4;
  cpu_.sregs.gs.base = kLinear + 0x2000;
  const auto rip = cpu_.regs.rip;
  const Code codes[] = {
      {0xf3, 0x0f, 0xb8, 0x43, 0x10},                          // [rbx+0x10]
      {0xf3, 0x0f, 0xb8, 0x83, 0x10, 0x00, 0x00, 0x00},        // [rbx+0x00000010]
      {0xf3, 0x42, 0x0f, 0xb8, 0x04, 0xa3},                    // [rbx+r12*4]
      {0xf3, 0x43, 0x0f, 0xb8, 0x84, 0xa1, 0x00, 0x20, 0, 0},  // [r9+r12*4+0x2000]
      {0x65, 0xf3, 0x0f, 0xb8, 0x04, 0x25, 0x10, 0, 0, 0},     // gs:[0x10]
      {0xf3, 0x0f, 0xb8, 0x05, 0x08, 0x1f, 0x00, 0x00},        // [rip+0x1f08], behind 8 bytes
  };
  for (const Code& code : codes) {
    cpu_.regs.rip = rip;
    cpu_.regs.rax = 0;
    ASSERT_EQ(run(code), Outcome::kDone) << std::hex << int{code[3]};
    EXPECT_EQ(cpu_.regs.rax, 8u) << std::hex << int{code[3]};
    EXPECT_EQ(cpu_.regs.rip, rip + code.size());
  }
}

TEST_F(ExecuteTest, AnOperandMayCrossPages) {
  store_le<uint64_t>(&ram_[0x2ffd], 0xff00ff00ff00ff00);
  cpu_.regs.rbx = kLinear + 0x2ffd;
  ASSERT_EQ(run({0xf3, 0x48, 0x0f, 0xb8, 0x03}), Outcome::kDone);
  EXPECT_EQ(cpu_.regs.rax, 32u);
}

TEST_F(ExecuteTest, APageFaultIsTheGuestsToHandle) {
  entry(0x13000, 3) = 0;
  cpu_.regs.rbx = kLinear + 0x2ffd;
  const kvm_regs before = cpu_.regs;
  ASSERT_EQ(run({0xf3, 0x48, 0x0f, 0xb8, 0x03}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kPageFaultVector);
  EXPECT_EQ(exception_.address, kLinear + 0x3000);
  EXPECT_EQ(exception_.error_code, 0u);
  EXPECT_EQ(std::memcmp(&before, &cpu_.regs, sizeof before), 0) << "the instruction starts again";
}

TEST_F(ExecuteTest, RightsOfPagesHold) {
  entry(0x13000, 2) = 0x2000 | 1;  // read-only
  cpu_.regs.rbx = kLinear + 0x2000;
  const Code exchange = {0xf0, 0x48, 0x0f, 0xc7, 0x0b};  // lock cmpxchg16b [rbx]
  ASSERT_EQ(run(exchange), Outcome::kException);
  EXPECT_EQ(exception_.error_code, 3u) << "a write to a page that is there";
  cpu_.sregs.cr0 &= ~uint64_t{1 << 16};
  EXPECT_EQ(run(exchange), Outcome::kDone) << "without write protection the kernel may";
  EXPECT_NE(entry(0x13000, 2) & 0x40, 0u) << "dirty";
  EXPECT_NE(entry(0x11000, 0) & 0x20, 0u) << "accessed";
  // A kernel that must not touch user pages, unless it says so.
  for (const uint64_t table : {0x10000 + 256 * 8, 0x11000, 0x12000, 0x13000 + 2 * 8}) {
    entry(table, 0) |= 4;
  }
  cpu_.sregs.cr4 |= 1 << 21;
  EXPECT_EQ(run(exchange), Outcome::kException);
  ASSERT_EQ(run({0x0f, 0x01, 0xcb}), Outcome::kDone) << "stac";
  EXPECT_EQ(run(exchange), Outcome::kDone);
  ASSERT_EQ(run({0x0f, 0x01, 0xca}), Outcome::kDone) << "clac";
  EXPECT_EQ(run(exchange), Outcome::kException);
}

TEST_F(ExecuteTest, WhatIsNotRamIsLeftAlone) {
  entry(0x13000, 2) = 0xd0000000 | kPresentWritable;
  cpu_.regs.rbx = kLinear + 0x2000;
  const kvm_regs before = cpu_.regs;
  EXPECT_EQ(run({0xf3, 0x0f, 0xb8, 0x03}), Outcome::kUnknown);
  EXPECT_EQ(std::memcmp(&before, &cpu_.regs, sizeof before), 0);
  cpu_.regs.rbx = 0x0000800000000000;  // not canonical
  ASSERT_EQ(run({0xf3, 0x0f, 0xb8, 0x03}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kProtectionVector);
}

// --- One by one ---

TEST_F(ExecuteTest, CompareExchangeStoresOrLoads) {
  store_le<uint64_t>(&ram_[0x2000], 1);
  store_le<uint64_t>(&ram_[0x2008], 2);
  cpu_.regs.rsi = kLinear + 0x2000;
  cpu_.regs.rax = 1, cpu_.regs.rdx = 2, cpu_.regs.rbx = 3, cpu_.regs.rcx = 4;
  const Code code = {0x48, 0x0f, 0xc7, 0x0e};
  ASSERT_EQ(run(code), Outcome::kDone);
  EXPECT_TRUE(zero());
  EXPECT_EQ(load_le<uint64_t>(&ram_[0x2000]), 3u);
  EXPECT_EQ(load_le<uint64_t>(&ram_[0x2008]), 4u);
  cpu_.regs.rbx = 9;
  ASSERT_EQ(run(code), Outcome::kDone);
  EXPECT_FALSE(zero());
  EXPECT_EQ(cpu_.regs.rax, 3u);
  EXPECT_EQ(cpu_.regs.rdx, 4u);
  EXPECT_EQ(load_le<uint64_t>(&ram_[0x2000]), 3u);
  cpu_.regs.rsi += 8;
  ASSERT_EQ(run(code), Outcome::kException);
  EXPECT_EQ(exception_.vector, kProtectionVector) << "not aligned";
}

TEST_F(ExecuteTest, TrapsArriveBehindTheInstruction) {
  const auto rip = cpu_.regs.rip;
  ASSERT_EQ(run({0xcc, 0x90, 0x90}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kBreakpointVector);
  EXPECT_EQ(cpu_.regs.rip, rip + 1);
  ASSERT_EQ(run({0xf1}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kDebugVector);
  cpu_.regs.rip = rip;
  ASSERT_EQ(run({0x0f, 0xb9, 0x40, 0x10}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kInvalidOpcodeVector);
  EXPECT_EQ(cpu_.regs.rip, rip) << "ud1 is a fault";
  ASSERT_EQ(run({0xf0, 0xf3, 0x0f, 0xb8, 0xc1}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kInvalidOpcodeVector) << "LOCK with what does not take it";
}

TEST_F(ExecuteTest, FloatingPointControl) {
  fpu_.state.fcw = 0x37f;
  fpu_.state.fsw = 0x3821;
  cpu_.regs.rbx = kLinear + 0x2000;
  ASSERT_EQ(run({0xd9, 0x3b}), Outcome::kDone);  // fnstcw [rbx]
  EXPECT_EQ(load_le<uint16_t>(&ram_[0x2000]), 0x37f);
  ASSERT_EQ(run({0xdf, 0xe0}), Outcome::kDone);  // fnstsw ax
  EXPECT_EQ(cpu_.regs.rax & 0xffff, 0x3821u);
  ASSERT_EQ(run({0x9b}), Outcome::kDone) << "what is masked does not wait";
  store_le<uint16_t>(&ram_[0x2000], 0x35e);      // two exceptions unmasked
  ASSERT_EQ(run({0xd9, 0x2b}), Outcome::kDone);  // fldcw [rbx]
  EXPECT_EQ(fpu_.state.fsw, 0xb8a1) << "and now one is pending";
  ASSERT_EQ(run({0x9b}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kFloatingPointVector);
  ASSERT_EQ(run({0xdb, 0xe2}), Outcome::kDone);  // fnclex
  EXPECT_EQ(fpu_.state.fsw, 0x3800);
  fpu_.state.ftwx = 0xff;
  ASSERT_EQ(run({0x0f, 0x77}), Outcome::kDone);  // emms
  EXPECT_EQ(fpu_.state.ftwx, 0);
  cpu_.sregs.cr0 |= 8;
  ASSERT_EQ(run({0x9b}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kNoDeviceVector) << "a lazy kernel switches its state first";
}

TEST_F(ExecuteTest, SseControl) {
  cpu_.regs.rbx = kLinear + 0x2000;
  fpu_.state.mxcsr = 0x1f80;
  ASSERT_EQ(run({0x0f, 0xae, 0x1b}), Outcome::kDone);  // stmxcsr
  EXPECT_EQ(load_le<uint32_t>(&ram_[0x2000]), 0x1f80u);
  store_le<uint32_t>(&ram_[0x2000], 0x1fa0);
  ASSERT_EQ(run({0x0f, 0xae, 0x13}), Outcome::kDone);  // ldmxcsr
  EXPECT_EQ(fpu_.state.mxcsr, 0x1fa0u);
  store_le<uint32_t>(&ram_[0x2000], 0x10000);
  ASSERT_EQ(run({0x0f, 0xae, 0x13}), Outcome::kException);
  EXPECT_EQ(exception_.vector, kProtectionVector);
}

TEST_F(ExecuteTest, CacheLines) {
  std::fill(ram_.begin() + 0x2000, ram_.begin() + 0x2100, std::byte{7});
  cpu_.regs.rax = kLinear + 0x2050;
  ASSERT_EQ(run({0x0f, 0x01, 0xfc}), Outcome::kDone);  // clzero
  EXPECT_EQ(ram_[0x203f], std::byte{7});
  EXPECT_EQ(ram_[0x2040], std::byte{0});
  EXPECT_EQ(ram_[0x207f], std::byte{0});
  EXPECT_EQ(ram_[0x2080], std::byte{7});
  EXPECT_EQ(run({0x66, 0x0f, 0xae, 0x30}), Outcome::kDone);  // clwb [rax]
}

TEST_F(ExecuteTest, SegmentQuestions) {
  const auto verw = [&](uint16_t selector) {
    cpu_.regs.rax = selector;
    EXPECT_EQ(run({0x0f, 0x00, 0xe8}), Outcome::kDone);
    return zero();
  };
  const auto verr = [&](uint16_t selector) {
    cpu_.regs.rax = selector;
    EXPECT_EQ(run({0x0f, 0x00, 0xe0}), Outcome::kDone);
    return zero();
  };
  EXPECT_TRUE(verw(0x18)) << "data";
  EXPECT_FALSE(verw(0x10)) << "code";
  EXPECT_TRUE(verr(0x10));
  EXPECT_FALSE(verr(0x20)) << "a task state segment";
  EXPECT_FALSE(verw(0)) << "the null selector";
  EXPECT_FALSE(verw(0x30)) << "beyond the table";
  EXPECT_FALSE(verw(0x1b)) << "asked with less privilege than it takes";
  EXPECT_TRUE(verw(0x2b));
  cpu_.regs.rcx = 0x18;
  ASSERT_EQ(run({0x0f, 0x02, 0xd1}), Outcome::kDone);  // lar edx, ecx
  EXPECT_TRUE(zero());
  EXPECT_EQ(cpu_.regs.rdx, 0xc09300u);
  ASSERT_EQ(run({0x0f, 0x03, 0xd1}), Outcome::kDone);  // lsl
  EXPECT_EQ(cpu_.regs.rdx, 0xffffffffu);
  cpu_.regs.rcx = 0x20;
  ASSERT_EQ(run({0x0f, 0x03, 0xd1}), Outcome::kDone);
  EXPECT_EQ(cpu_.regs.rdx, 0x67u);
}

// --- What it must not do ---

TEST_F(ExecuteTest, LeavesOtherCodeAlone) {
  const kvm_regs before = cpu_.regs;
  for (const Code& code :
       {Code{}, Code{0x90}, Code{0x0f}, Code{0x0f, 0x0b}, Code{0x0f, 0x05}, Code{0xf3, 0x0f, 0xb8},
        Code{0x0f, 0xb8, 0xc1}, Code{0xf3, 0x0f, 0xb8, 0x84, 0x24, 1, 2, 3},
        Code{0x66, 0xc4, 0xe2, 0x70, 0xf2, 0xc2}, Code{0x0f, 0xae, 0xe8}, Code{0x0f, 0xc7, 0x0b},
        Code(20, 0x66)}) {
    EXPECT_EQ(run(code), Outcome::kUnknown);
  }
  cpu_.sregs.cs.l = 0;
  EXPECT_EQ(run({0xcc}), Outcome::kUnknown) << "not 64-bit code";
  EXPECT_EQ(std::memcmp(&before, &cpu_.regs, sizeof before), 0);
}

// Guests choose the bytes and the state: nothing may crash, hang, or leave guest RAM.
TEST_F(ExecuteTest, SurvivesRandomCodeAndState) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  constexpr uint8_t kStarts[] = {0xf3, 0x66, 0xf2, 0x48, 0x0f, 0xc4, 0xc5, 0xd9, 0xdb, 0xcc};
  const std::vector<std::byte> fresh = ram_;
  for (int i = 0; i < 200000; ++i) {
    if (i % 500 == 0) ram_ = fresh;  // tables are hit too
    Code code(random() % 17);
    for (auto& byte : code) byte = static_cast<uint8_t>(random());
    if (!code.empty()) code[0] = kStarts[random() % sizeof kStarts];
    if (code.size() > 2 && random() % 2 != 0) code[1] = 0x0f;
    for (auto* r : {&cpu_.regs.rax, &cpu_.regs.rbx, &cpu_.regs.rcx, &cpu_.regs.rsi}) {
      *r = random() % 3 == 0 ? random() : kLinear + random() % 0x11000;
    }
    cpu_.regs.rip = kLinear + random() % 0x10000;
    cpu_.sregs.ss.dpl = random() % 2 != 0 ? 3 : 0;
    (void)run(code);
  }
}

// --- In a guest ---

// On a host without hardware virtualization KVM stops at popcnt; on another one the processor does
// it. The guest sees no difference.
TEST(Completion, AGuestGoesOnWhereKvmGaveUp) {
  if (::access("/dev/kvm", F_OK) != 0) GTEST_SKIP() << "no /dev/kvm";
  // mov $0xf0f01, %ecx; popcnt %ecx, %eax; out %eax, $0xf4; hlt
  const auto kernel =
      test::TestElf({0xb9, 0x01, 0x0f, 0x0f, 0x00, 0xf3, 0x0f, 0xb8, 0xc1, 0xe7, 0xf4, 0xf4},
                    0x200000, false)
          .bytes();
  MachineConfig config;
  config.memory_bytes = uint64_t{16} << 20;
  config.kernel.bytes = kernel;
  config.complete_instructions = true;
  Machine machine(std::move(config));
  machine.start();
  ASSERT_TRUE(machine.wait_for(std::chrono::seconds(10)));
  const ExitReason reason = machine.wait();
  EXPECT_EQ(reason.kind, ExitKind::kGuestExit) << reason.text;
  EXPECT_EQ(reason.status, 9);
  EXPECT_LE(machine.counters().completed, 1u);
}

}  // namespace
}  // namespace minivmm::vmm::emulate
