#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Debian's stock kernel as a guest, from its boot to its end, at what a user does with it: the root on
an overlay, a file system on a second disk, several queues and processors, a reboot, power off.

Where KVM has hardware virtualization the guests run on it; elsewhere on an emulated host
(emulated_host.py). inner.sh is what the guest does, outer.sh what its host does meanwhile."""

import os
import re
import shutil
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from stock import PACKAGES, StockKernel, hardware
from emulated_host import IMAGES, EmulatedHost, linux, qemu
from harness.daemon import minivmm
from harness.scene import MIB, have, run

LIMIT = 200.0  # seconds; where nothing else runs 50 are enough


class LinuxGuest(StockKernel):
    def can_run(self):
        return hardware() or qemu()

    def prepare(self):
        """What outer.sh wants in its folder, by name."""
        root = linux.root(self.busybox)
        root.file("sbin/init", os.path.join(HERE, "inner.sh"), 0o755)
        root.program(shutil.which("mke2fs"), "sbin/mke2fs")
        root.write_ext4(self.path("root.raw"), 64 * MIB)
        linux.root(self.busybox).write_ext4(self.path("tour.raw"), 32 * MIB)
        linux.initramfs(self.kernel, self.busybox, (*linux.VIRTIO_MMIO, "virtio_rng")
                        ).write_initramfs(self.path("initrd.img"))
        subprocess.run(["strip", "-o", self.path("minivmm"), minivmm()], check=True)
        shutil.copyfile(self.kernel.image, self.path("vmlinuz"))
        shutil.copy(os.path.join(IMAGES, "tour"), self.path("tour"))
        return ("root.raw", "tour.raw", "tour", "initrd.img", "minivmm", "vmlinuz")

    def run_outer(self):
        """Lines of outer.sh, which then has left its disks in self.dir."""
        names = self.prepare()
        if hardware():
            script = os.path.join(HERE, "outer.sh")
            text = run(["sh", script, self.dir], LIMIT)[1]
            print(text, flush=True)
            return text.split("\n")
        tree = linux.root(self.busybox)
        for name in names:
            tree.file(f"work/{name}", self.path(name))
        tree.program(self.path("minivmm"), "work/minivmm")
        tree.file("work/outer.sh", os.path.join(HERE, "outer.sh"))
        for program in ("nbdcopy", "debugfs"):
            if have(program):
                tree.program(shutil.which(program))
        host = EmulatedHost(self.dir, PACKAGES, tree)
        lines = host.run(LIMIT)
        for name in ("root.qcow2", "data.raw", "blocks.qcow2"):
            host.fetch(name, self.path(name))
        return lines

    def test_a_stock_kernel_lives_on_our_disks(self):
        text = "\n".join(self.run_outer())

        def said(pattern):
            found = re.search(rf"(?m)^(?:LOG |OUTER ){pattern}$", text)
            self.assertIsNotNone(found, f"not said: {pattern}")
            return found

        self.assertNotIn("FAILED", text)
        said("INNER stage 1 cpus 2 root /dev/vda ext4 rw.*")
        for line in ("vda/serial rootserial", "vdb/serial dataserial", "vdc/serial blocks",
                     "vda/queue/logical_block_size 512", "vdc/queue/logical_block_size 4096",
                     "vdc/queue/physical_block_size 4096", "vda/queue/discard_granularity 65536",
                     "vdb/ro 0", "vdd/ro 1", "vda queues 1", "vdb queues 2",
                     "rng virtio_rng.0", "write to a read-only disk is refused ok", "mkfs ok",
                     "data after remount ok", "fstrim ok", "4096-byte blocks ok", "reboot",
                     "kept across the reboot ok", "data after the reboot ok",
                     "memory 3 GiB, above 4 GiB 1",
                     "disks 17", "vde works ok", "vdf works ok", "vdg works ok", "vdh works ok",
                     "vdq works ok", "written in parallel ok",
                     "poweroff"):
            said("INNER " + re.escape(line))

        # What fstrim gave back is a hole in the file now: two files of 2.75 MiB.
        written, trimmed = (int(said(rf"{at} (\d+)").group(1)) for at in ("written", "trimmed"))
        self.assertLess(trimmed, written - 5000, "blocks of 512 bytes")
        # Eight synchronous writes: with a flush each, or written through without any.
        through = int(said(r"after through (\d+)").group(1)) - int(
            said(r"before through (\d+)").group(1))
        back = int(said(r"after back (\d+)").group(1)) - int(said(r"before back (\d+)").group(1))
        self.assertEqual(through, 8)
        self.assertEqual(back, 16)
        # The other front ends saw the same disks while the guest had them.
        for disk in ("vdb", "vdd"):
            inner = said(rf"INNER sum {disk} (\w+)").group(1)
            for by in ("fuse", "nbd"):
                if re.search(rf"(?m)^OUTER {by} {disk} ", text) or not hardware():
                    self.assertEqual(said(rf"{by} {disk} (\w+)").group(1), inner)
        # The old window's driver gets 32 features; the others have VERSION_1 among 64.
        for disk, version_1, indirect, event_index in (
                ("vde", "0", "1", "1"), ("vdf", "1", "0", "1"), ("vdg", "1", "1", "0"),
                ("vdh", "1", "0", "0"), ("vdq", "1", "1", "1")):
            features = said(rf"INNER {disk} driver features ([01]+)").group(1)
            self.assertEqual((features[32], features[28], features[29]),
                             (version_1, indirect, event_index), disk)
        # Reboot, power off, triple fault, panic.
        self.assertEqual(re.findall(r"(?m)^OUTER stage ended (\d+)", text), ["0", "0", "124", "0"])
        self.assertRegex(text, r"(?m)^ERR .*the guest crashed: triple fault")
        self.assertRegex(text, r"(?m)^LOG .*Kernel panic")
        self.assertNotRegex(text, r"(?m)^ERR .*(error:|problem)")
        self.assertRegex(text, r"(?m)^ERR .*the guest reset itself")
        self.assertRegex(text, r"(?m)^ERR .*the guest switched itself off")
        said("tour ok")
        for line in ("Linux 6.*", "written by Linux", "a write to mnt/root is refused",
                     "exit status 0"):
            self.assertRegex(text, f"(?m)^TOUR {line}$")
        said("end")

        for name in ("root.qcow2", "blocks.qcow2"):
            self.check(name)
        self.tool("convert", "-O", "raw", self.path("root.qcow2"), self.path("whole.raw"))
        for name in ("whole.raw", "data.raw"):
            status, output = run(["e2fsck", "-f", "-n", self.path(name)])
            self.assertEqual(status, 0, f"{name}: {output}")


if __name__ == "__main__":
    unittest.main()
