// SPDX-License-Identifier: Apache-2.0
#include "vmm/host_probe.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "base/error.h"
#include "vmm/kvm_api.h"
#include "vmm/layout.h"
#include "vmm/syscall_probe.h"

namespace minivmm::vmm {
namespace {

std::string cpu_virtualization_flag() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line);
    for (std::string word; words >> word;) {
      if (word == "vmx" || word == "svm") return word;
    }
    break;
  }
  return {};
}

std::optional<bool> nested_parameter() {
  for (const char* path :
       {"/sys/module/kvm_intel/parameters/nested", "/sys/module/kvm_amd/parameters/nested"}) {
    std::ifstream file(path);
    char value = 0;
    if (file >> value) return value == 'Y' || value == '1';
  }
  return std::nullopt;
}

void ask_kvm(HostProbe& out) {
  const Kvm kvm;
  out.recommended_vcpus = kvm.capability(KVM_CAP_NR_VCPUS);
  out.max_vcpus = std::min(kvm.capability(KVM_CAP_MAX_VCPUS), kMaxVcpus);
  out.guest_syscalls = guest_syscall_works(kvm);
  out.kind = kind_of(out.cpu_flag, out.guest_syscalls);
  if (out.guest_syscalls.value_or(true)) return;
  out.advice =
      "a guest program's system calls do not work on this KVM: the built-in probe guest runs, "
      "slowly in its kernel part; a Linux guest cannot run programs here. Use a host with VT-x or "
      "AMD-V (or "
      "nested virtualization switched on in the machine above) for other guests";
}

}  // namespace

KvmKind kind_of(const std::string& cpu_flag, std::optional<bool> guest_syscalls) noexcept {
  return cpu_flag.empty() || !guest_syscalls.value_or(true) ? KvmKind::kWithoutHardware
                                                            : KvmKind::kHardware;
}

HostProbe probe_host() {
  HostProbe out;
  out.cpu_flag = cpu_virtualization_flag();
  out.nested = nested_parameter();
  out.device_exists = ::access("/dev/kvm", F_OK) == 0;
  {
    const base::UniqueFd fd(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
    out.device_opens = static_cast<bool>(fd);
    if (fd) {
      out.api_version = kvm_ioctl_value(fd.get(), KVM_GET_API_VERSION, 0);
      out.missing = missing_capabilities(fd.get());
    }
  }
  try {
    ask_kvm(out);
  } catch (const base::Error& error) {
    out.kind = KvmKind::kNone;
    out.problem = error.what();
    out.advice = out.cpu_flag.empty() && !out.device_exists
                     ? "this processor (or the machine above) offers no virtualization; guests "
                       "cannot run, NBD, FUSE and the image tool can"
                     : "guests cannot run until this is put right; NBD, FUSE and the image tool "
                       "work without KVM";
  }
  return out;
}

bool kvm_uses_hardware() {
  for (const char* path : {"/sys/module/kvm_intel", "/sys/module/kvm_amd"}) {
    if (::access(path, F_OK) == 0) return true;
  }
  const Kvm kvm;
  return kind_of(cpu_virtualization_flag(), guest_syscall_works(kvm)) == KvmKind::kHardware;
}

std::string_view linux_arguments_without_hardware() noexcept {
  // Extended state is not emulated at all. The other features are completed one by one
  // (vmm/emulate), or are promised to the guest by a CPUID that KVM does not let us change.
  //
  // The rest is for speed, at 1.7 million instructions a second. A stock kernel spends minutes on
  // what the blacklist names: looking up a symbol for each traced function, tracefs, reading its
  // own type information. Nobody could use it, since no program runs. And a timer interrupt takes
  // thousands of instructions, 250 times a second: a kernel that believes its processor to be ten
  // times as fast asks for each one ten times as late, and catches up by kvmclock, which is right.
  // Its short delays it gets from lpj= (2.5 GHz).
  return "noxsave clearcpuid=smap,smep,xsave,cx16,umip,fsgsbase,popcnt,movbe,rdrand,rdseed,invpcid,"
         "pcid,pge,rdtscp,rdpid,clflushopt,clwb,ssse3,sse4_1,sse4_2,avx,avx2,aes,pclmulqdq,sha_ni,"
         "erms,fsrm mitigations=off nowatchdog noreplace-smp rodata=off init_on_alloc=0 lsm= "
         "audit=0 psi=0 cgroup_disable=memory cryptomgr.notests clocksource=kvm-clock "
         "tsc_early_khz=30000000 lpj=10000000 initcall_blacklist="
         "ftrace_check_for_weak_functions,trace_eval_init,tracer_init_tracefs,init_dynamic_event,"
         "init_kprobe_trace,init_uprobe_trace,cubictcp_register,bpf_tcp_ca_kfunc_init,kfunc_init,"
         "bpf_rstat_kfunc_init,bpf_key_sig_kfuncs_init,bpf_prog_test_run_init";
}

std::string_view to_string(KvmKind kind) noexcept {
  switch (kind) {
    case KvmKind::kNone:
      return "none";
    case KvmKind::kHardware:
      return "hardware";
    case KvmKind::kWithoutHardware:
      return "without hardware virtualization";
  }
  return "unknown";
}

}  // namespace minivmm::vmm
