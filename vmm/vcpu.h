// SPDX-License-Identifier: Apache-2.0
// One virtual CPU and the thread that runs it. Owned by the machine. The thread only runs the guest
// and answers its port and memory-mapped accesses; whatever ends it is told to the host object.
#pragma once

#include <linux/kvm.h>
#include <string>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <thread>
#include <vector>

#include "base/unique_fd.h"
#include "virtio/guest_memory.h"
#include "vmm/bus.h"
#include "vmm/cpu_setup.h"
#include "vmm/exit_reason.h"
#include "vmm/kvm_api.h"

namespace minivmm::vmm {

// What a vCPU thread needs of its machine. All of it may be called from several vCPU threads.
class VcpuHost {
 public:
  virtual ~VcpuHost() = default;
  virtual const Bus& ports() const = 0;
  virtual const Bus& mmio() const = 0;
  virtual bool ending() const noexcept = 0;
  virtual bool confine_threads() const noexcept = 0;
  virtual bool paused() const noexcept = 0;
  // Returns when the machine runs again, or ends.
  virtual void wait_while_paused() noexcept = 0;
  virtual void vcpu_ended(ExitReason reason) noexcept = 0;
  virtual bool triple_fault_is_reset() const noexcept = 0;
  // RAM, where instructions are to be done that KVM's emulator lacks; else null.
  virtual const virtio::GuestMemory* completion_memory() const noexcept = 0;
};

class Vcpu {
 public:
  struct Counters {
    std::atomic<uint64_t> exits{0};
    std::atomic<uint64_t> port_accesses{0};
    std::atomic<uint64_t> mmio_accesses{0};
    std::atomic<uint64_t> unclaimed{0};
    std::atomic<uint64_t> completed{0};
  };

  // Makes the vCPU with CPUID, MSRs, FPU and LAPIC set. `supported` is KVM's table, which is asked
  // for once a machine: each of its leaves may be an exit where the host is a guest itself. Throws
  // base::Error.
  Vcpu(const Kvm& kvm, std::span<const kvm_cpuid_entry2> supported, int vm_fd, unsigned index,
       unsigned count, VcpuHost& host);
  // The thread has been joined.
  ~Vcpu();
  Vcpu(const Vcpu&) = delete;
  Vcpu& operator=(const Vcpu&) = delete;

  // Only for the first vCPU; KVM keeps the others waiting for the guest's start-up IPI.
  void set_boot_state(const BootState& boot);
  // `processors` of the host to run on; empty: any. Throws std::system_error where no thread can be
  // made.
  void start(const std::string& thread_name, std::vector<unsigned> processors);
  bool started() const noexcept { return thread_.joinable(); }
  // Makes the thread leave the guest and look at VcpuHost::ending() and paused(). After start(),
  // before join().
  void kick() noexcept;
  void join();

  const Counters& counters() const noexcept { return counters_; }

 private:
  void configure(const Kvm& kvm, std::span<const kvm_cpuid_entry2> supported, unsigned count);
  void loop();
  void take_kick();
  bool handle_exit();
  void handle_io();
  void handle_mmio();
  bool handle_internal_error();
  void end(ExitKind kind, std::string text);
  std::string describe_internal_error() const;
  std::string registers() const;

  VcpuHost& host_;
  base::UniqueFd fd_;
  kvm_run* run_ = nullptr;
  size_t run_size_ = 0;
  unsigned index_;
  Counters counters_;
  std::thread thread_;
};

}  // namespace minivmm::vmm
