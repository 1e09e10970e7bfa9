#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Kernels on this machine's own KVM, also where that has no hardware virtualization: instructions that
KVM's emulator lacks are completed, and the kernel is kept off the rest. The small kernel of
images/linux/build-kernel mounts its ext4 root read-write from an overlay; Debian's stock kernel, which
has its drivers in modules, gets as far as its first program."""

import os
import re
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stock import PACKAGES, StockKernel, hardware
from emulated_host import IMAGES, debian, linux
from harness.scene import MIB, SLOW, Scene, run

CACHE = os.path.dirname(PACKAGES)
NO_SOURCE = 3  # build-kernel's exit status
BUILD_LIMIT = 1500.0
BOOT_LIMIT = 300.0
STOCK_LIMIT = 1500.0  # some hundred million instructions one by one


class OwnKernel(Scene):
    def setUp(self):
        super().setUp()
        if not os.path.exists("/dev/kvm"):
            self.skipTest("no /dev/kvm")
        if not SLOW and not os.path.exists(os.path.join(CACHE, "vmlinux-minivmm")):
            self.skipTest(f"the kernel is not in {CACHE}; MINIVMM_SLOW=1 builds it, in 3 minutes")
        done = subprocess.run([os.path.join(IMAGES, "build-kernel"), CACHE], timeout=BUILD_LIMIT,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
        if done.returncode == NO_SOURCE:
            self.skipTest(f"no kernel source: {done.stderr.decode()}")
        self.assertEqual(done.returncode, 0, done.stderr.decode()[-2000:])
        self.kernel = done.stdout.decode().split()[0]
        root = linux.root(debian.busybox(PACKAGES))
        root.text("sbin/init", "#!/bin/sh\necho INNER user space\ntouch /root/mark\nsync\n"
                               "mount -o remount,ro /\nreboot -f\n", 0o755)
        root.write_ext4(self.path("root.raw"), 48 * MIB)
        self.overlay("root.qcow2", "root.raw", 48 * MIB)

    def dumped(self, image, field):
        _, text = run(["dumpe2fs", "-h", image])
        return re.search(rf"(?m)^{field}: +(.*)$", text).group(1)

    def test_it_mounts_its_root_on_an_overlay(self):
        with open(self.path("root.raw"), "rb") as f:
            before = f.read()
        vm = self.daemon("boot", "--kernel", self.kernel, "--memory", "128M", "--append",
                         "console=ttyS0 reboot=k panic=-1 root=/dev/vda rw loglevel=7",
                         "--disk", "root.qcow2,id=root")
        at, _ = vm.output.wait(lambda l: "mounted filesystem" in l and "r/w" in l, 0, BOOT_LIMIT)
        at, _ = vm.output.wait(lambda l: "VFS: Mounted root (ext4 filesystem)" in l, at, BOOT_LIMIT)
        vm.output.wait(lambda l: "Run /sbin/init" in l, at, BOOT_LIMIT)
        if hardware():
            vm.output.wait(lambda l: "INNER user space" in l, at, BOOT_LIMIT)
        # Where system calls do not work its first program dies, and the kernel with it.
        self.assertEqual(vm.wait(BOOT_LIMIT), 0, vm.errors.text())
        errors = vm.errors.text()
        self.assertEqual("added to the kernel's command line" in errors, not hardware(), errors)
        self.assertEqual("no program of it can run" in errors, not hardware(), errors)

        self.check("root.qcow2")
        with open(self.path("root.raw"), "rb") as f:
            self.assertEqual(f.read(), before, "the base image was written to")
        self.tool("convert", "-O", "raw", self.path("root.qcow2"), self.path("after.raw"))
        # It was mounted once; what it left in the journal can be replayed.
        self.assertEqual(self.dumped(self.path("root.raw"), "Mount count"), "0")
        self.assertEqual(self.dumped(self.path("after.raw"), "Mount count"), "1")
        status, text = run(["e2fsck", "-f", "-y", self.path("after.raw")])
        self.assertIn(status, (0, 1), text)
        status, text = run(["e2fsck", "-f", "-n", self.path("after.raw")])
        self.assertEqual(status, 0, text)


class StockKernelHere(StockKernel):
    def can_run(self):
        return os.path.exists("/dev/kvm")

    def test_it_gets_to_its_first_program(self):
        if not SLOW:
            self.skipTest("takes minutes: MINIVMM_SLOW=1")
        if hardware():
            self.skipTest("where KVM runs any guest, linux_test.py does more with it")
        subprocess.run([os.path.join(IMAGES, "extract-vmlinux"), self.kernel.image,
                        self.path("vmlinux")], check=True)
        tree = linux.root(self.busybox)
        tree.text("init", "#!/bin/sh\necho INNER user space\n", 0o755)
        tree.write_initramfs(self.path("initrd.img"))
        self.create("disk.raw", MIB, "-f", "raw")
        vm = self.daemon("boot", "--kernel", "vmlinux", "--initrd", "initrd.img", "--disk",
                         "disk.raw,format=raw", "--append", "console=ttyS0 reboot=k panic=-1")
        at, _ = vm.output.wait(lambda l: "Linux version 6." in l, 0, STOCK_LIMIT)
        vm.output.wait(lambda l: "Run /init as init process" in l, at, STOCK_LIMIT)
        # Its first system call is its end, which was foretold.
        self.assertEqual(vm.wait(BOOT_LIMIT), 0, vm.errors.text())
        self.assertIn("no program of it can run", vm.errors.text())


if __name__ == "__main__":
    unittest.main()
