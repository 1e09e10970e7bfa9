#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Programs of others on top of our server: nbdfuse, nbdkit's nbd plugin, nbdcopy, QEMU over
`nbd+unix`, fio's nbd engine."""

import os
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, is_mounted, run, wait_until

LIMIT = 20.0
SIZE = 4 * MIB


class Interop(Scene):
    def setUp(self):
        super().setUp()
        self.content = self.random.randbytes(MIB) + bytes(SIZE - MIB)
        with open(self.path("file"), "wb") as f:
            f.write(self.content)
        self.socket = self.path("s")
        self.server = self.daemon("serve", "--disk", "file,format=raw,id=d", "--export",
                                  "d,writable", "--nbd", f"nbd+unix:///?socket={self.socket}",
                                  "--io-threads", "2")
        self.uri = f"nbd+unix:///d?socket={self.socket}"

    def end(self):
        self.assertEqual(self.server.stop(), 0, self.server.errors.text())
        self.assertNotIn("failed", "\n".join(self.server.errors.lines))

    def must(self, *command):
        status, text = run(list(command), cwd=self.dir)
        self.assertEqual(status, 0, f"{command}: {text}")
        return text

    def behind(self):
        with open(self.path("file"), "rb") as f:
            return f.read()

    @unittest.skipUnless(have("nbdfuse") and os.path.exists("/dev/fuse"), "nbdfuse or FUSE is missing")
    def test_nbdfuse(self):
        os.mkdir(self.path("mnt"))
        fuse = subprocess.Popen(["nbdfuse", self.path("mnt"), self.uri])
        self.addCleanup(fuse.wait)
        self.addCleanup(fuse.kill)
        name = self.path("mnt/nbd")
        wait_until(lambda: is_mounted(self.path("mnt")) and os.path.exists(name), LIMIT, "a mount")
        self.assertEqual(os.path.getsize(name), SIZE)
        with open(name, "r+b", buffering=0) as f:
            self.assertEqual(f.read(MIB), self.content[:MIB])
            f.seek(5000)
            f.write(b"over nbdfuse")
            os.fsync(f.fileno())
        self.must("fusermount3", "-u", self.path("mnt"))
        self.assertEqual(fuse.wait(LIMIT), 0)
        self.assertEqual(self.behind()[5000:5012], b"over nbdfuse")
        self.end()

    @unittest.skipUnless(have("nbdkit", "nbdcopy", "nbdinfo"), "nbdkit is not installed")
    def test_nbdkits_nbd_plugin(self):
        for more in ((), ("shared=true",)):
            far = self.path("k" + str(len(more)))
            kit = subprocess.Popen(["nbdkit", "-f", "-U", far, "nbd", f"uri={self.uri}", *more])
            self.addCleanup(kit.wait)
            self.addCleanup(kit.kill)
            wait_until(lambda p=far: os.path.exists(p), LIMIT, "nbdkit is there")
            uri = f"nbd+unix:///?socket={far}"
            self.assertEqual(self.must("nbdinfo", "--map", "--totals", uri),
                             self.must("nbdinfo", "--map", "--totals", self.uri))
            client = NbdClient(far, "", limit=LIMIT)
            for offset, length in ((0, 4096), (100, 1), (MIB - 3, 70_001)):
                data = self.random.randbytes(length)
                client.write(offset, data, fua=True)
                self.assertEqual(client.read(offset, length), data)
            client.zero(8192, 65536)
            client.trim(131072, 65536)
            client.flush()
            client.close()
            self.must("nbdcopy", "--connections=4", uri, self.path("copy"))
            with open(self.path("copy"), "rb") as f:
                self.assertEqual(f.read(), self.behind())
            kit.terminate()
            self.assertEqual(kit.wait(LIMIT), 0)
        self.end()

    @unittest.skipUnless(have("nbdkit", "nbdcopy"), "nbdkit is not installed")
    def test_nbdkits_filters_above_us(self):
        far = self.path("k")
        kit = subprocess.Popen(["nbdkit", "-f", "-U", far, "--filter=cow", "--filter=cache",
                                "--filter=blocksize", "nbd", f"uri={self.uri}", "minblock=4096"])
        self.addCleanup(kit.wait)
        self.addCleanup(kit.kill)
        wait_until(lambda: os.path.exists(far), LIMIT, "nbdkit is there")
        client = NbdClient(far, "", limit=LIMIT)
        client.write(1000, b"above")
        self.assertEqual(client.read(998, 9), self.content[998:1000] + b"above" + self.content[1005:1007])
        client.close()
        self.assertEqual(self.behind(), self.content)
        kit.terminate()
        self.assertEqual(kit.wait(LIMIT), 0)
        self.end()

    @unittest.skipUnless(have("qemu-img", "qemu-io"), "QEMU's tools are not there")
    def test_qemu(self):
        with open(self.path("original"), "wb") as f:
            f.write(self.content)
        self.must("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw",
                  self.path("original"), self.uri)
        self.assertEqual(self.behind(), self.content)
        self.must("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.uri, "-F", "raw",
                  self.path("over"))
        self.must("qemu-io", "-c", "write -P 3 0 64k", self.path("over"))
        self.must("qemu-img", "rebase", "-u", "-b", self.uri, "-F", "raw", self.path("over"))
        self.must("qemu-img", "commit", "-q", self.path("over"))
        self.assertEqual(self.behind()[:65536], b"\x03" * 65536)
        self.assertEqual(self.behind()[65536:], self.content[65536:])
        bench = self.must("qemu-img", "bench", "-c", "2000", "-d", "32", "-w", "--flush-interval", "100",
                          "-s", "4k", "-f", "raw", self.uri)
        self.assertIn("Run completed", bench)
        self.end()

    @unittest.skipUnless(have("nbdcopy"), "nbdcopy is not installed")
    def test_nbdcopy_from_one_server_to_another(self):
        other = self.path("t")
        self.daemon("serve", "--blockdev", f"driver=memory,node-name=m,size={SIZE}", "--export",
                    "m,writable", "--nbd", f"nbd+unix:///?socket={other}")
        target = f"nbd+unix:///m?socket={other}"
        for more in ((), ("--synchronous",), ("--request-size=4096", "--connections=4"),
                     ("--allocated",), ("--destination-is-zero",), ("--no-extents",)):
            self.must("nbdcopy", "--flush", *more, self.uri, target)
            client = NbdClient(other, "m", limit=LIMIT)
            self.assertEqual(client.read(0, SIZE), self.content, more)
            client.zero(0, SIZE)
            client.close()
        self.end()


if __name__ == "__main__":
    unittest.main()
