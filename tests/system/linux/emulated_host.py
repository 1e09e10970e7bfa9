# SPDX-License-Identifier: Apache-2.0
"""A host with virtualization where there is none: QEMU emulates a processor with SVM, Debian's stock
kernel runs on it with kvm-amd, and in that our minivmm runs guests at real KVM semantics."""

import os
import re
import shutil
import subprocess
import sys
import time

IMAGES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../images/linux")
sys.path.insert(0, IMAGES)
# pylint: disable=wrong-import-position
from recipe import debian, linux

# What its disk needs, and what most tests are about: guests inside it.
DISK = ("virtio_pci", "virtio_blk")
VIRTUALIZATION = ("fuse", "kvm_amd")
# With the other two left on, the emulated processor was seen to hang.
PARAMETERS = {"kvm_amd": "nested=0 npt=1 vgif=0 vls=0"}

# What the kernel says is not for the line where the work's own lines are: it could be in the middle of one.
INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
exec > /dev/ttyS0 2>&1
echo OUTER up
sh /work/outer.sh /work
sync
mount -o remount,ro /
poweroff -f
"""


def qemu():
    return shutil.which("qemu-system-x86_64")


class EmulatedHost:
    """`tree` is its root file system, with /work/outer.sh in it, which is what it runs. `devices` are
    more arguments for QEMU."""

    def __init__(self, folder, packages, tree, size=768 << 20, modules=VIRTUALIZATION, devices=()):
        self.folder = folder
        self.devices = devices
        self.kernel = debian.kernel(packages)
        self.disk = os.path.join(folder, "outer.raw")
        self.initrd = os.path.join(folder, "outer.img")
        tree.text("sbin/init", INIT, 0o755)
        tree.write_ext4(self.disk, size)
        linux.initramfs(self.kernel, debian.busybox(packages), (*DISK, *modules),
                        PARAMETERS).write_initramfs(self.initrd)

    def run(self, limit):
        """Runs it to its end; returns the lines of the first serial line, prints the kernel's own."""
        said_by_kernel = os.path.join(self.folder, "kernel.log")
        command = [
            qemu(), "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-smp", "1",
            "-m", "1300", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-serial", f"file:{said_by_kernel}",
            "-kernel", self.kernel.image, "-initrd", self.initrd,
            # The check of the timer fails where the emulator does not get its processor in time.
            "-append", "console=ttyS1 quiet panic=-1 root=/dev/vda rw no_timer_check",
            "-drive", f"if=none,id=d,file={self.disk},format=raw,cache=unsafe",
            "-device", "virtio-blk-pci,drive=d", *self.devices]
        begin = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT)
        lines = []
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            lines.append(f"EMULATOR killed after {limit} s")
        lines += re.sub(r"\r", "", output.decode("utf-8", "replace")).split("\n")
        lines.append(f"EMULATOR ran {time.monotonic() - begin:.0f} s")
        with open(said_by_kernel, encoding="utf-8", errors="replace") as log:
            print("the emulated host's kernel:", log.read().replace("\r", ""), sep="\n", flush=True)
        return lines

    def fetch(self, name, target):
        """Copies a file of its /work out of its disk."""
        done = subprocess.run(["debugfs", "-R", f"dump /work/{name} {target}", self.disk],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
        if done.returncode != 0 or not os.path.exists(target):
            raise RuntimeError(f"debugfs: {done.stdout.decode()}")
