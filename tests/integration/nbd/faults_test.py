#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What lies behind the server fails: the error comes with the request that it belongs to, and other
requests, other clients and other exports go on."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, wait_until

LIMIT = 20.0


class Faults(Scene):
    def setUp(self):
        super().setUp()
        self.socket = self.path("s")

    def serve(self, *exports, **more):
        """Each: a name and the options of its node."""
        words = []
        for name, node in exports:
            words += ["--blockdev", f"{node},node-name={name}", "--export", f"{name},writable"]
        return self.daemon("serve", *words, "--nbd", f"nbd+unix:///?socket={self.socket}", **more)

    def client(self, name, limit=LIMIT):
        client = NbdClient(self.socket, name, limit=limit)
        self.addCleanup(client.close)
        return client

    def fails(self, error, body):
        with self.assertRaises(OSError) as caught:
            body()
        self.assertEqual(caught.exception.errno, error)

    def fault(self, what, size=MIB):
        return f"driver=fault,{what},file.driver=memory,file.size={size}"

    def test_each_request_gets_its_own_error(self):
        self.serve(("sick", self.fault("op=read,offset=65536,length=4096,errno=EIO")),
                   ("well", f"driver=memory,size={MIB}"))
        sick, beside, well = self.client("sick"), self.client("sick"), self.client("well")
        begun = [(i, sick.begin(0, i * 4096, 4096)) for i in range(64)]
        wrong = []
        for i, each in begun:
            try:
                sick.finish(each)
            except OSError as e:
                self.assertEqual(e.errno, errno.EIO)
                wrong.append(i)
        self.assertEqual(wrong, [16])
        # A request over it fails as a whole; the same client, its neighbour and another export go on.
        self.fails(errno.EIO, lambda: sick.read(60_000, 10_000))
        self.assertEqual(sick.read(0, 65536), bytes(65536))
        self.assertEqual(beside.read(69632, 4096), bytes(4096))
        self.assertEqual(well.read(65536, 4096), bytes(4096))

    def test_no_space_is_said_of_the_write_that_had_none(self):
        self.serve(("d", self.fault("op=write,offset=131072,length=4096,errno=ENOSPC")),
                   ("z", self.fault("op=zero,errno=ENOSPC")))
        client = self.client("d")
        writes = [(i, client.begin(1, i * 4096, 4096, bytes([i]) * 4096)) for i in range(64)]
        wrong = []
        for i, each in writes:
            try:
                client.finish(each)
            except OSError as e:
                self.assertEqual(e.errno, errno.ENOSPC)
                wrong.append(i)
        self.assertEqual(wrong, [32])
        client.flush()
        for i in range(64):
            if i != 32:
                self.assertEqual(client.read(i * 4096, 4096), bytes([i]) * 4096)
        self.fails(errno.ENOSPC, lambda: self.client("z").zero(0, 4096))

    def test_a_flush_that_fails_is_an_error_and_not_only_once_for_a_file(self):
        self.serve(("once", self.fault("op=flush,count=1,errno=EIO")))
        client = self.client("once")
        client.write(0, b"x" * 512)
        self.fails(errno.EIO, client.flush)
        client.flush()
        # FUA is a write and its flush.
        fua = self.fault("op=flush,errno=ENOSPC")
        other = self.path("t")
        self.daemon("serve", "--blockdev", f"{fua},node-name=f", "--export", "f,writable", "--nbd",
                    f"nbd+unix:///?socket={other}", "--blockdev", f"driver=memory,node-name=m,size={MIB}",
                    "--export", "m,writable")
        client = NbdClient(other, "f", limit=LIMIT)
        self.addCleanup(client.close)
        client.write(0, b"x" * 512)
        self.fails(errno.ENOSPC, client.flush)
        beside = NbdClient(other, "m", limit=LIMIT)
        self.addCleanup(beside.close)
        beside.write(0, b"x" * 512, fua=True)

    def test_what_hangs_for_seconds_holds_nobody_else(self):
        seconds = 2
        self.serve(("slow", self.fault(f"op=any,offset=0,length=4096,errno=none,"
                                       f"delay-ns={seconds * 1_000_000_000}")),
                   ("fast", f"driver=memory,size={MIB}"))
        slow, beside, fast = self.client("slow"), self.client("slow"), self.client("fast")
        begin = time.monotonic()
        stuck = [slow.begin(0, 0, 4096), slow.begin(1, 0, 512, b"x" * 512), beside.begin(0, 0, 512)]
        for client in (slow, beside, fast):
            for i in range(1, 50):
                self.assertEqual(client.read(i * 4096, 4096), bytes(4096))
                client.write(i * 8192, bytes(512))
        self.assertLess(time.monotonic() - begin, seconds * 0.8)
        self.assertFalse(any(each["done"].is_set() for each in stuck))
        for client, each in zip((slow, slow, beside), stuck):
            client.finish(each)
        self.assertGreaterEqual(time.monotonic() - begin, seconds * 0.9)

    def test_a_file_that_was_cut_short_behind_the_servers_back(self):
        with open(self.path("file"), "wb") as f:
            f.write(b"x" * MIB)
        server = self.serve(("d", f"driver=raw,file.driver=file,file.filename={self.path('file')}"),
                            ("m", f"driver=memory,size={MIB}"))
        client, other = self.client("d"), self.client("m")
        self.assertEqual(client.read(MIB - 512, 512), b"x" * 512)
        os.truncate(self.path("file"), MIB // 2)
        self.assertEqual(client.read(0, 4096), b"x" * 4096)
        # Behind its end, and over it: an error or zeroes, never what lay in memory, and never a hang.
        for offset, length in ((MIB - 4096, 4096), (MIB // 2 - 512, 1024), (0, MIB)):
            try:
                data = client.read(offset, length)
                inside = max(0, MIB // 2 - offset)
                self.assertEqual(data, b"x" * inside + bytes(length - inside))
            except OSError as e:
                self.assertEqual(e.errno, errno.EIO)
        self.assertEqual(other.read(0, 4096), bytes(4096))
        client.write(MIB - 512, b"y" * 512)
        client.flush()
        self.assertEqual(client.read(MIB - 512, 512), b"y" * 512)
        self.assertEqual(server.stop(), 0, server.errors.text())

    @unittest.skipUnless(os.geteuid() == 0, "a loop file system needs root")
    def test_a_full_file_system_under_a_sparse_file(self):
        """An ext4 of 4 MiB: the writes that have no room say so, those that have room go on."""
        with open(self.path("fs"), "wb") as f:
            f.truncate(4 * MIB)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", self.path("fs")],
                       check=True)
        os.mkdir(self.path("mnt"))
        mounted = subprocess.run(["mount", "-o", "loop", self.path("fs"), self.path("mnt")],
                                 check=False, capture_output=True)
        if mounted.returncode != 0:
            self.skipTest(f"no loop mount here: {mounted.stderr.decode().strip()}")
        self.addCleanup(subprocess.run, ["umount", "-l", self.path("mnt")], check=False)
        with open(self.path("mnt/disk"), "wb") as f:
            f.truncate(16 * MIB)
        server = self.serve(
            ("d", f"driver=raw,file.driver=file,file.filename={self.path('mnt/disk')}"),
            ("m", f"driver=memory,size={MIB}"))
        client, other = self.client("d"), self.client("m")
        good, full = [], 0
        for i in range(128):
            try:
                client.write(i * 131072, bytes([i + 1]) * 65536, fua=i % 4 == 0)
                good.append(i)
            except OSError as e:
                self.assertEqual(e.errno, errno.ENOSPC)
                full += 1
        self.assertGreater(len(good), 8)
        self.assertGreater(full, 8)
        # What has room is overwritten; others do not notice; a flush covers what succeeded.
        client.write(0, b"z" * 65536)
        other.write(0, b"o" * 512)
        client.flush()
        for i in good[1:]:
            self.assertEqual(client.read(i * 131072, 65536), bytes([i + 1]) * 65536)
        # And with room again it goes on.
        client.trim(0, 16 * MIB)
        client.write(8 * MIB, b"n" * 65536)
        client.flush()
        self.assertEqual(client.read(8 * MIB, 65536), b"n" * 65536)
        self.assertEqual(server.stop(), 0, server.errors.text())

    def test_killed_in_the_middle(self):
        """What was flushed is there, the image is consistent, and writes are there or not."""
        size = 8 * MIB
        self.create("image", size, "-f", "qcow2")
        flushed = {}
        for turn in range(3):
            server = self.daemon("serve", "--disk", "image,id=d", "--export", "d,writable", "--nbd",
                                 f"nbd+unix:///?socket={self.socket}")
            clients = [self.client("d") for _ in range(3)]
            stop = threading.Event()
            written = [dict() for _ in clients]

            def work(which, client):
                at = 0
                number = turn * 1_000_000
                try:
                    while not stop.is_set():
                        number += 1
                        offset = (which * 512 + at % 512) * 4096
                        at += 7
                        # Undecided until a flush: either is right.
                        written[which].setdefault(offset, []).append(number)
                        client.write(offset, number.to_bytes(8, "big") * 512)
                        if number % 10 == 0:
                            client.flush()
                            for where, numbers in written[which].items():
                                flushed[where] = numbers[-1]
                                del numbers[:-1]
                except OSError:
                    pass
            threads = [threading.Thread(target=work, args=each) for each in enumerate(clients)]
            for each in threads:
                each.start()
            wait_until(lambda: len(flushed) > 30 * (turn + 1), LIMIT, "there is something to lose")
            time.sleep(self.random.random() * 0.1)
            server.kill()
            stop.set()
            for each in threads:
                each.join()
            self.check("image", leaks_allowed=True)
            os.unlink(self.socket)
            server = self.daemon("serve", "--disk", "image,id=d", "--export", "d", "--nbd",
                                 f"nbd+unix:///?socket={self.socket}")
            reader = self.client("d")
            for where, number in flushed.items():
                seen = int.from_bytes(reader.read(where, 8), "big")
                later = [n for each in written for n in each.get(where, [])]
                self.assertIn(seen, [number, *later])
                flushed[where] = seen
            self.assertEqual(server.stop(signal.SIGTERM), 0)


if __name__ == "__main__":
    unittest.main()
