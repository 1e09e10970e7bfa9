# SPDX-License-Identifier: Apache-2.0
"""A host with virtualization where there is none: QEMU emulates a processor with SVM, Debian's stock
kernel runs on it with kvm-amd, and in that our minivmm runs guests at real KVM semantics."""

import os
import select
import shutil
import socket
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

# It says that it lives every five seconds: a silence of this many is the emulator's end, whatever
# runs inside.
SILENCE = 45.0

# What the kernel says is not for the line where the work's own lines are: it could be in the middle of one.
INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mkdir -p /dev/shm
exec > /dev/ttyS0 2>&1
echo OUTER up
while sleep 5; do echo ALIVE; done &
sh /work/outer.sh /work
sync
mount -o remount,ro /
poweroff -f
"""


def qemu():
    return shutil.which("qemu-system-x86_64")


class EmulatorHung(Exception):
    """The emulated processor stands still: nothing that runs on it can be the cause."""


class EmulatedHost:
    """`tree` is its root file system, with /work/outer.sh in it, which is what it runs. `devices` are
    more arguments for QEMU."""

    def __init__(self, folder, packages, tree, size=768 << 20, modules=VIRTUALIZATION, devices=()):
        self.folder = folder
        self.devices = devices
        self.kernel = debian.kernel(packages)
        self.disk = os.path.join(folder, "outer.raw")
        self.initrd = os.path.join(folder, "outer.img")
        self.monitor = os.path.join(folder, "monitor.sock")
        self.tree = tree
        self.size = size
        tree.text("sbin/init", INIT, 0o755)
        linux.initramfs(self.kernel, debian.busybox(packages), (*DISK, *modules),
                        PARAMETERS).write_initramfs(self.initrd)

    def run(self, limit):
        """Runs it from a new disk to its end, at most `limit` seconds; returns the lines of its first
        serial line, which it prints as they come, so that whoever ends this sees how far it was. Prints
        what its kernel said. If the emulator hangs, once more."""
        try:
            return self._run(limit)
        except EmulatorHung as e:
            print(f"The emulated host hung, which shows nothing about us: {e}. Once more.", flush=True)
            return self._run(limit)

    def _run(self, limit):
        self.tree.write_ext4(self.disk, self.size)
        said_by_kernel = os.path.join(self.folder, "kernel.log")
        command = [
            qemu(), "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-smp", "1",
            "-m", "1300", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-serial", f"file:{said_by_kernel}", "-monitor", f"unix:{self.monitor},server,nowait",
            "-kernel", self.kernel.image, "-initrd", self.initrd,
            # The check of the timer fails where the emulator does not get its processor in time.
            "-append", "console=ttyS1 quiet panic=-1 root=/dev/vda rw no_timer_check",
            "-drive", f"if=none,id=d,file={self.disk},format=raw,cache=unsafe",
            "-device", "virtio-blk-pci,drive=d", *self.devices]
        # On one processor of ours: where its threads run side by side the emulation of SVM loses
        # interrupts, its own and those of the guests inside. It changes the word that says which are
        # pending with plain instructions, and without the lock that its other threads hold.
        last = max(os.sched_getaffinity(0))
        with subprocess.Popen(["taskset", "-c", str(last), *command], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                lines = self._listen(process.stdout.fileno(), limit)
            finally:
                process.kill()
                with open(said_by_kernel, encoding="utf-8", errors="replace") as log:
                    print("the emulated host's kernel:", log.read().replace("\r", ""), sep="\n",
                          flush=True)
        return lines

    def _listen(self, fd, limit):
        begin = time.monotonic()
        lines, rest = [], b""
        while True:
            now = time.monotonic() - begin
            ready, _, _ = select.select([fd], [], [], max(0.0, min(SILENCE, limit - now)))
            if not ready:
                self._where()
                if now + SILENCE < limit:
                    raise EmulatorHung(f"it said nothing for {SILENCE:.0f} s")
                return lines + [f"EMULATOR FAILED: not ended after {limit:.0f} s"]
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                return lines
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.append(line.decode("utf-8", "replace").replace("\r", ""))
                print(f"[{time.monotonic() - begin:6.1f}] {lines[-1]}", flush=True)

    def _where(self):
        """Prints where the emulated processor stands."""
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(5)
                monitor.connect(self.monitor)
                for query in ("info registers", "info lapic"):
                    monitor.sendall(f"{query}\n".encode())
                    time.sleep(1)
                    print(monitor.recv(1 << 16).decode("utf-8", "replace").replace("\r", ""), flush=True)
        except OSError as e:
            print(f"the emulator's monitor: {e}", flush=True)

    def fetch(self, name, target):
        """Copies a file of its /work out of its disk."""
        done = subprocess.run(["debugfs", "-R", f"dump /work/{name} {target}", self.disk],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                              env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
        if done.returncode != 0 or not os.path.exists(target):
            raise RuntimeError(f"debugfs: {done.stdout.decode()}")
