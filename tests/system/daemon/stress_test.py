#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A guest, two NBD connections and FUSE change one qcow2 overlay at the same time, in ranges of
their own and in a shared one. Afterwards the content is what the model allows, the image is clean,
and QEMU reads from it what our export served."""

import os
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.guest_stress import GuestStress
from harness.model import Model, content
from harness.nbd import NbdClient
from harness.load import Load
from harness.scene import MIB, SLOW, Scene, have, run

DISK = 16 * MIB
BASE = 11 * MIB + 1536  # the base is shorter, and ends within a cluster
SECONDS = 60 if SLOW else 2.5  # for each of the guest's two jobs


class Stress(Scene):
    def make_overlay(self, cluster_size):
        base = content(1, 0, BASE)
        with open(self.path("base"), "wb") as f:
            f.write(base)
        self.overlay("disk", "base", DISK, cluster_size=cluster_size)
        return base.ljust(DISK, b"\0")

    def layout(self):
        """Ranges whose borders lie within clusters, so that neighbours share them."""
        borders = [0, 3 * MIB, 5 * MIB, 7 * MIB, 9 * MIB, 11 * MIB, 12 * MIB, 13 * MIB]
        borders = [b + 512 * self.random.randrange(1, 90) if b else 0 for b in borders] + [DISK]
        return list(zip(borders, borders[1:]))

    def stress(self, cluster_size, *options, cache="writeback"):
        before = self.make_overlay(cluster_size)
        guest_range, *host_ranges, shared = self.layout()
        vm = self.boot("--disk", f"disk,id=disk0,num-queues=2,cache={cache},l2-cache-size=64k",
                       "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                       "--export", "disk0,writable", *options)
        load = Load(Model(before))
        nbds = [NbdClient(self.path("m.sock")) for _ in range(2)]
        fuse = FuseDisk(self.path("mnt/disk0"))
        for own, disk in zip(host_ranges, [*nbds, *nbds, fuse, fuse]):
            load.add(disk, own, shared, self.random.random())
        alone = GuestStress(self.random.randrange(1 << 32), guest_range[0],
                            guest_range[1] - guest_range[0])
        among = GuestStress(self.random.randrange(1 << 32), shared[0], shared[1] - shared[0],
                            writer=2, shared=True)
        load.start()
        last_alone = int(vm.job(alone.line(SECONDS), SECONDS + 60)["last"])
        last_among = int(vm.job(among.line(SECONDS), SECONDS + 60)["last"])
        load.stop()
        self.assertEqual(load.failures, [])
        print(f"  {load.model.counts()}; {last_alone} and {last_among} requests of the guest")
        self.assertGreater(min(load.requests, last_alone, last_among), 100, "hardly any load")

        data = b"".join(nbds[0].read(at, MIB) for at in range(0, DISK, MIB))
        self.assertEqual(alone.wrong(data, before, last_alone, last_alone), [])
        zeroed = among.zeroed(last_among)
        self.assertEqual(load.model.wrong(
            data[guest_range[1]:], guest_range[1], False,
            lambda at, block: among.wrote(at, block) or (at in zeroed and block == bytes(512))), [])
        self.copy_out(data)
        for disk in (*nbds, fuse):
            disk.close()
        vm.type("exit 0")
        self.assert_ended(vm)
        self.check("disk")
        self.compare_with_qemu()
        with open(self.path("base"), "rb") as f:
            self.assertEqual(f.read(), before[:BASE], "the base was written to")

    def copy_out(self, data):
        """What the export serves, by another client where there is one."""
        if not have("nbdcopy"):
            with open(self.path("served"), "wb") as f:
                f.write(data)
            return
        status, text = run(["nbdcopy", f"nbd+unix:///disk0?socket={self.path('m.sock')}",
                            self.path("served")])
        self.assertEqual(status, 0, text)
        with open(self.path("served"), "rb") as f:
            self.assertEqual(f.read(), data)

    def compare_with_qemu(self):
        if not have("qemu-img"):
            return
        status, text = run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", self.path("served"),
                            self.path("disk")])
        self.assertEqual(status, 0, text)

    def test_one_loop(self):
        self.stress(65536)

    def test_two_loops_small_clusters(self):
        self.stress(4096, "--io-threads", 2)

    def test_two_loops_direct_epoll(self):
        self.stress(65536, "--io-threads", 2, "--io-backend", "epoll", cache="none")


if __name__ == "__main__":
    unittest.main(verbosity=2)
