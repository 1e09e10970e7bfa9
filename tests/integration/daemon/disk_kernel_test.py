#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`boot` with nothing but a disk: the kernel in its /boot is started. Here it is the probe guest."""

import os
import shutil
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL
from harness.scene import MIB, Scene, run

PROBE = os.environ["MINIVMM_PROBE_ELF"]


class DiskKernel(Scene):
    def tree(self, name, files):
        """A folder with these files: path to text, or to None for the probe guest."""
        for path, text in files.items():
            target = self.path(os.path.join(name, path))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if text is None:
                shutil.copy(PROBE, target)
            else:
                with open(target, "w", encoding="utf-8") as file:
                    file.write(text)
        return self.path(name)

    def file_system(self, image, files, offset=0, size=24 * MIB):
        tree = self.tree(image + ".tree", files)
        with open(self.path(image), "ab") as file:
            file.truncate(max(offset + size, file.tell()))
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={offset}", "-d", tree,
                        self.path(image), f"{size >> 10}k"], check=True, stderr=subprocess.DEVNULL)

    @staticmethod
    def grub(arguments):
        return f"menuentry 'A system' {{\n  linux /boot/vmlinuz-1 {arguments}\n}}\n"

    def bootable(self, image="disk.raw", arguments=SHELL, **more):
        self.file_system(image, {"boot/vmlinuz-1": None,
                                 "boot/grub/grub.cfg": self.grub(arguments)}, **more)
        return f"{self.path(image)},format=raw,id=disk0"

    def start(self, disk, *arguments):
        vm = self.daemon("boot", "--memory", "64M", "--disk", disk, *arguments)
        vm.wait_shell()
        return vm

    @staticmethod
    def says(vm, text):
        vm.errors.wait(lambda line: text in line)

    def test_the_kernel_that_grub_would_start(self):
        vm = self.start(self.bootable())
        self.says(vm, "starting disk 'disk0', the disk: /boot/grub/grub.cfg, A system")
        # What was loaded is out of the guest's way: the disk is its own.
        vm.job("write disk=0 seed=3 offset=20M length=64K")
        vm.job("verify disk=0 seed=3 offset=20M length=64K")
        vm.type("exit")
        self.assert_ended(vm)

    def test_on_a_partition_of_an_overlay(self):
        image = self.path("disk.raw")
        self.bootable(offset=2 * MIB)
        with open(image, "r+b") as file:
            file.seek(446)
            file.write(struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 4096, 24 * MIB // 512))
            file.seek(510)
            file.write(b"\x55\xaa")
        self.overlay("top.qcow2", "disk.raw", os.path.getsize(image))
        vm = self.start(self.path("top.qcow2") + ",id=disk0")
        self.says(vm, "partition 1: /boot/grub/grub.cfg")
        vm.type("exit")
        self.assert_ended(vm)

    def test_own_arguments_come_last(self):
        vm = self.start(self.bootable(arguments="job=info"), "--append", SHELL)
        vm.type("exit")
        self.assert_ended(vm)

    def test_the_probe_guest_on_request_and_without_a_kernel(self):
        vm = self.start(self.bootable(), "--probe", "--append", SHELL)
        vm.type("exit")
        self.assert_ended(vm)
        self.assertNotIn("grub", vm.errors.text())
        self.file_system("data.raw", {"home/x": "text"}, size=4 * MIB)
        vm = self.start(self.path("data.raw") + ",format=raw,id=disk0", "--append", SHELL)
        self.says(vm, "no kernel was found in its /boot, so the probe guest runs")
        vm.type("exit")
        self.assert_ended(vm)

    def test_what_cannot_be_started_says_so(self):
        self.file_system("disk.raw", {"boot/vmlinuz-1": "no kernel",
                                      "boot/grub/grub.cfg": self.grub("x")}, size=4 * MIB)
        text = self.refused("boot", "--disk", self.path("disk.raw") + ",format=raw,id=disk0")
        self.assertIn("disk 'disk0', the disk: /boot/grub/grub.cfg", text)
        self.bootable("large.raw")
        text = self.refused("boot", "--memory", "1M", "--disk",
                            self.path("large.raw") + ",format=raw,id=disk0")
        self.assertRegex(text, "bytes are more than 1048576|memory")

    def test_file_systems_that_cannot_be_read_are_named(self):
        for name, offset, magic in (("XFS", 0, b"XFSB"), ("btrfs", 0x10040, b"_BHRfS_M"),
                                    ("an LVM physical volume", 512, b"LABELONE")):
            with open(self.path("disk.raw"), "wb") as file:
                file.truncate(4 * MIB)
                file.seek(offset)
                file.write(magic)
            text = self.refused("boot", "--disk", self.path("disk.raw") + ",format=raw")
            self.assertIn(f"the disk: {name}; give one with --kernel, or --probe", text)
        vm = self.start(self.path("disk.raw") + ",format=raw", "--probe", "--append", SHELL)
        vm.type("exit")
        self.assert_ended(vm)

    def test_text_from_the_disk_does_not_reach_the_terminal_raw(self):
        self.file_system("disk.raw", {
            "boot/vmlinuz-1": None,
            "boot/grub/grub.cfg": f"menuentry '\x1b]0;owned\x07' {{\n linux /boot/vmlinuz-1 {SHELL}\n}}\n"})
        vm = self.start(self.path("disk.raw") + ",format=raw,id=disk0")
        self.says(vm, "?]0;owned?")
        vm.type("exit")
        self.assert_ended(vm)

    def test_damage_is_an_error_or_harmless(self):
        # No kernel that runs, so that every round ends: refused, or by the probe guest.
        self.file_system("sound.raw", {"boot/vmlinuz-1": "no kernel",
                                       "boot/grub/grub.cfg": self.grub("x")}, size=8 * MIB)
        with open(self.path("sound.raw"), "rb") as file:
            sound = file.read()
        for _ in range(12):
            damaged = bytearray(sound)
            for _ in range(6):
                damaged[1024 + self.random.randrange(256 * 1024)] ^= 1 << self.random.randrange(8)
            with open(self.path("damaged.raw"), "wb") as file:
                file.write(damaged)
            status, text = run([os.environ["MINIVMM"], "boot", "--memory", "64M", "--disk",
                                self.path("damaged.raw") + ",format=raw", "--append", "job=info"],
                               stdin=subprocess.DEVNULL)
            self.assertIn(status, (0, 1), text)


if __name__ == "__main__":
    unittest.main()
