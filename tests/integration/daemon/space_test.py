#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The file system under an overlay runs full while all three front ends write: they see the error,
nothing crashes, the image stays consistent, and once there is room it works again."""

import errno
import os
import signal
import subprocess
import sys
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.model import BLOCK, content
from harness.nbd import NbdClient
from harness.scene import MIB, Scene

DISK = 64 * MIB
ROOM = 8 * MIB
FILL = 5 * MIB  # what somebody else keeps and later frees
PIECE = 32768


class Space(Scene):
    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest("mounting a tmpfs needs root")
        os.mkdir(self.path("small"))
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "minivmm-test",
                                  self.path("small")], check=False, capture_output=True)
        if mounted.returncode != 0:
            self.skipTest(f"a tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
        with open(self.path("base"), "wb") as f:
            f.write(content(1, 0, DISK // 4))
        self.create("small/disk", DISK, "-f", "qcow2", "-b", self.path("base"), "-F", "raw")
        with open(self.path("small/other"), "wb") as f:
            f.write(bytes(FILL))

    def fill(self, disk, begin, end, answered):
        """Writes pieces until three have failed; notes those that were answered with success."""
        failures = []
        at = begin
        while at < end and len(failures) < 3:
            try:
                disk.write(at, content(at, at, PIECE))
                answered.append(at)
            except OSError as e:
                failures.append(e.errno)
            at += PIECE + 65536
        self.errors.append(failures)

    def everything_full(self, vm, nbd, fuse):
        """All three write until there is no room. Returns where the hosts succeeded."""
        self.errors = []
        third = DISK // 4
        # One piece at least, whoever is quicker then.
        nbd.write(third, content(third, third, PIECE))
        answered = [third]
        threads = [threading.Thread(target=self.fill, args=(disk, begin, begin + third, answered))
                   for disk, begin in ((nbd, third), (fuse, 2 * third))]
        job = vm.begin_job(f"stress seed=5 count=3000 offset={3 * third} length={third} bs=4096 "
                           "max_blocks=32 tolerate")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            self.assertFalse(thread.is_alive(), "a request hangs")
        ok, values, line = vm.job_result(job)
        # What the guest was told had worked, it found again: only that would be a failure.
        self.assertTrue(ok, line)
        self.assertGreater(int(values["errors"]), 0, line)
        for failures in self.errors:
            self.assertEqual(len(failures), 3, "no error though there was no room")
            self.assertLessEqual(set(failures), {errno.ENOSPC, errno.EIO})
        return answered

    def assert_content(self, disk, answered):
        for at in answered:
            self.assertEqual(disk.read(at, PIECE), content(at, at, PIECE), f"at {at:#x}")
        # Where a write failed each block is the old one or the new one.
        for at in range(DISK // 4, 3 * (DISK // 4), MIB):
            data = disk.read(at, 65536)
            for i in range(0, len(data), BLOCK):
                block = data[i:i + BLOCK]
                self.assertTrue(block == bytes(BLOCK) or block[:8] == content(1, 0, 8)[:8],
                                f"at {at + i:#x}")

    def full_and_free(self, *options):
        vm = self.boot("--disk", "small/disk,id=disk0,l2-cache-size=64k", "--backing-root", self.dir,
                       "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                       "--export", "disk0,writable", *options)
        nbd = NbdClient(self.path("m.sock"))
        fuse = FuseDisk(self.path("mnt/disk0"))
        answered = self.everything_full(vm, nbd, fuse)
        self.assert_content(nbd, answered)
        # Allocated data can be written where nothing has to grow, and read.
        nbd.write(answered[0], content(answered[0], answered[0], PIECE))
        self.assert_content(fuse, answered)
        os.unlink(self.path("small/other"))
        # There is room: everybody can write again, and flush, without a restart.
        for disk, at in ((nbd, DISK // 4 - MIB), (fuse, DISK // 4 - 2 * MIB)):
            disk.write(at, content(at, at, PIECE))
            disk.flush()
            answered.append(at)
        vm.job("write offset=0 length=65536 pattern=9")
        vm.job("flush")
        vm.job("verify offset=0 length=65536 pattern=9")
        self.assert_content(nbd, answered)
        fuse.close()
        nbd.close()
        self.assert_ended(vm, 0, signal.SIGTERM)
        self.check("small/disk", leaks_allowed=True)
        again = self.daemon("serve", "--disk", "small/disk,id=disk0", "--backing-root", self.dir,
                            "--nbd", "nbd+unix:///?socket=m.sock", "--export", "disk0")
        nbd = NbdClient(self.path("m.sock"))
        self.assert_content(nbd, answered)
        self.assertEqual(nbd.read(0, 65536), bytes([9]) * 65536)
        nbd.close()
        self.assert_ended(again, 0, signal.SIGTERM)

    def test_one_loop(self):
        self.full_and_free("--io-threads", 1)

    def test_two_loops_epoll(self):
        self.full_and_free("--io-threads", 2, "--io-backend", "epoll")

    def test_ended_while_full(self):
        """The end comes while there is no room: it ends, what was flushed before is there."""
        vm = self.boot("--disk", "small/disk,id=disk0", "--backing-root", self.dir,
                       "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                       "--export", "disk0,writable")
        nbd = NbdClient(self.path("m.sock"))
        fuse = FuseDisk(self.path("mnt/disk0"))
        first = DISK // 4
        nbd.write(first - MIB, content(7, first - MIB, PIECE))
        nbd.flush()
        self.everything_full(vm, nbd, fuse)
        fuse.close()
        nbd.close()
        vm.send(signal.SIGTERM)
        # Whether the last flush found room is its luck; it says so where it did not.
        self.assertIn(vm.wait(), (0, 1), vm.errors.text())
        self.check("small/disk", leaks_allowed=True)
        self.daemon("serve", "--disk", "small/disk,id=disk0", "--backing-root", self.dir,
                    "--nbd", "nbd+unix:///?socket=m.sock", "--export", "disk0")
        nbd = NbdClient(self.path("m.sock"))
        self.assertEqual(nbd.read(first - MIB, PIECE), content(7, first - MIB, PIECE))
        nbd.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
