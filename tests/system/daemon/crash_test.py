#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""kill -9 under load. What had been flushed is there, the image is not corrupt, and the next start
on the same image, socket, mount directory and pid file works at once."""

import itertools
import os
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.guest_stress import GuestStress
from harness.load import Load
from harness.model import Model, content
from harness.nbd import NbdClient
from harness.scene import MIB, SLOW, Scene, is_mounted

DISK = 8 * MIB
BASE = 6 * MIB + 2560
KILLS = 200 if SLOW else 20
GUEST_END = 3 * MIB + 512 * 7


class Crash(Scene):
    def setUp(self):
        super().setUp()
        self.values = itertools.count(1 << 32)
        self.pid_file = self.path("pid")
        self.front_ends = ("--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                           "--export", "disk0,writable", "--pid-file", "pid")

    def crash(self, before, disk_option, options):
        """One life under load and its end. Returns (model, the guest's job, what it flushed)."""
        vm = self.boot("--disk", disk_option, *self.front_ends, *options)
        load = Load(Model(before, self.values))
        disks = [NbdClient(self.path("m.sock")) for _ in range(2)]
        disks.append(FuseDisk(self.path("mnt/disk0")))
        shared = (7 * MIB + 1024, DISK)
        borders = [GUEST_END, *(GUEST_END + (shared[0] - GUEST_END) // 512 * i // 4 * 512
                                for i in range(1, 4)), shared[0]]
        for own, disk in zip(zip(borders, borders[1:]), [*disks, disks[2]]):
            load.add(disk, own, shared, self.random.random())
        job = GuestStress(self.random.randrange(1 << 32), 0, GUEST_END)
        load.start()
        vm.begin_job(job.line(30))
        time.sleep(self.random.uniform(0.02, 0.5))
        # From here on a broken connection is what is expected.
        load.killed.set()
        vm.kill()
        load.stop(killed=True)
        self.assertEqual(load.failures, [])
        vm.output.text()  # to the end
        durable = job.durable(vm.output.lines)
        # A file that is still open must not keep the dead mount in the way.
        self.addCleanup(disks[2].close)
        for disk in disks[:2]:
            disk.close()
        vm.cleanup()
        return load.model, job, durable

    def recover(self, disk_option, options):
        """The next start, with nothing done in between; returns the disk's content."""
        began = time.monotonic()
        daemon = self.daemon("serve", "--disk", disk_option, *self.front_ends, *options)
        took = time.monotonic() - began
        self.assertLess(took, 8, "the next start was held up")
        with open(self.pid_file, encoding="utf-8") as f:
            self.assertEqual(int(f.read()), daemon.pid)
        nbd = NbdClient(self.path("m.sock"))
        data = b"".join(nbd.read(at, MIB) for at in range(0, DISK, MIB))
        fuse = FuseDisk(self.path("mnt/disk0"))
        self.assertEqual(fuse.read(MIB, MIB), data[MIB:2 * MIB])
        fuse.close()
        nbd.close()
        self.assert_ended(daemon, 0, 15)
        daemon.cleanup()
        for left in ("m.sock", "pid"):
            self.assertFalse(os.path.exists(self.path(left)), f"{left} is left behind")
        self.assertFalse(is_mounted(self.path("mnt")))
        return data

    def crashes(self, kills, cluster_size, cache, *options):
        base = content(1, 0, BASE)
        with open(self.path("base"), "wb") as f:
            f.write(base)
        self.overlay("disk", "base", DISK, cluster_size=cluster_size)
        disk_option = f"disk,id=disk0,cache={cache},l2-cache-size=32k"
        before = base.ljust(DISK, b"\0")
        flushed = 0
        for number in range(kills):
            with self.subTest(number=number):
                model, job, durable = self.crash(before, disk_option, options)
                data = self.recover(disk_option, options)
                self.check("disk", leaks_allowed=True)
                self.assertEqual(model.wrong(data[GUEST_END:], GUEST_END, True), [], "hosts")
                self.assertEqual(job.wrong(data, before, durable), [], f"guest: {durable} flushed")
                flushed += durable
                before = data
                if number == 0:
                    print(f"  {model.counts()}; the guest flushed {durable} requests")
        self.assertGreater(flushed, 0, "the guest never flushed")
        with open(self.path("base"), "rb") as f:
            self.assertEqual(f.read(), base, "the base was written to")

    def test_two_loops(self):
        self.crashes(KILLS // 2, 65536, "writeback", "--io-threads", 2)

    def test_small_clusters(self):
        self.crashes(KILLS // 4, 1024, "writeback")

    def test_direct_epoll(self):
        self.crashes(KILLS // 4, 4096, "none", "--io-threads", 2, "--io-backend", "epoll")


if __name__ == "__main__":
    unittest.main(verbosity=2)
