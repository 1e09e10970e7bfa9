#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `boot` makes of its options for a kernel. The kernel is the probe guest, given as a file."""

import os
import signal
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL
from harness.scene import MIB, Scene

PROBE = os.environ["MINIVMM_PROBE_ELF"]
MOST_DEVICES = 19


class GuestOptions(Scene):
    def kernel(self, *arguments):
        vm = self.boot("--kernel", PROBE, "--devices", "command-line", *arguments)
        vm.send(signal.SIGUSR1)
        vm.errors.wait(lambda line: "guest: running" in line)
        vm.errors.wait(lambda line: "disk0: virtio block" in line)
        return vm

    def has_rng(self, vm):
        return any("rng: virtio" in line for line in vm.errors.lines)

    def disks(self, count):
        return [word for i in range(count)
                for word in ("--disk", f"driver=memory,size={MIB},node-name=disk{i}")]

    def test_a_kernel_gets_an_entropy_device_behind_its_disks(self):
        vm = self.kernel(*self.disks(1))
        self.assertTrue(self.has_rng(vm))
        # The disk is where it was without it, and works.
        vm.job("write disk=0 seed=1 length=64K")
        vm.job("verify disk=0 seed=1 length=64K")
        vm.type("exit")
        self.assert_ended(vm)

    def test_no_entropy_device_on_request(self):
        self.assertFalse(self.has_rng(self.kernel("--no-rng", *self.disks(1))))

    def test_a_machine_full_of_disks_does_without(self):
        self.assertTrue(self.has_rng(self.kernel(*self.disks(MOST_DEVICES - 1))))
        self.assertFalse(self.has_rng(self.kernel(*self.disks(MOST_DEVICES))))

    def test_the_probe_guest_gets_none(self):
        vm = self.boot(*self.disks(1))
        vm.send(signal.SIGUSR1)
        vm.errors.wait(lambda line: "disk0: virtio block" in line)
        self.assertFalse(self.has_rng(vm))

    def test_memory_that_is_taken_at_the_start(self):
        vm = self.boot("--prealloc", *self.disks(1))
        with open(f"/proc/{vm.pid}/status", encoding="ascii") as status:
            resident = next(int(l.split()[1]) for l in status if l.startswith("VmRSS:"))
        self.assertGreaterEqual(resident, 64 * 1024)

    def test_wrong_values_are_refused(self):
        for options, text in ((("--devices", "foo"), "auto, acpi or command-line"),
                              (("--hugetlb", "3M"), "only of 2 MiB and 1 GiB"),
                              (("--hugetlb", "2X"), "hugetlb")):
            self.assertIn(text, self.refused("boot", *options, *self.disks(1)))


if __name__ == "__main__":
    unittest.main()
