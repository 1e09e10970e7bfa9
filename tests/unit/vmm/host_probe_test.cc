// SPDX-License-Identifier: Apache-2.0
#include "vmm/host_probe.h"

#include <gtest/gtest.h>

namespace minivmm::vmm {
namespace {

TEST(HostProbe, SystemCallsTellTheKindOfKvm) {
  EXPECT_EQ(kind_of("vmx", true), KvmKind::kHardware);
  EXPECT_EQ(kind_of("svm", std::nullopt), KvmKind::kHardware);
  EXPECT_EQ(kind_of("", true), KvmKind::kWithoutHardware);
  // The processor could, but this KVM does not use it: a Linux guest cannot run programs.
  EXPECT_EQ(kind_of("vmx", false), KvmKind::kWithoutHardware);
}

}  // namespace
}  // namespace minivmm::vmm
