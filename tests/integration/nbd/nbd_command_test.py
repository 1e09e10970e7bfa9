#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`minivmm nbd info` and `list` beside nbdinfo, on our server and on others'. (connect is tested where
there is a kernel with the driver: tests/system/nbd.)"""

import json
import os
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.scene import MIB, Scene, have, run, wait_until


@unittest.skipUnless(have("nbdinfo"), "nbdinfo is not installed")
class Beside(Scene):
    def setUp(self):
        super().setUp()
        self.socket = self.path("s")
        self.create("disk", 10 * MIB, "-f", "qcow2")

    def nbd(self, *arguments, status=0):
        got, text = run([minivmm(), "nbd", *arguments])
        self.assertEqual(got, status, text)
        return text

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.socket}"

    def compare(self, name):
        ours = json.loads(self.nbd("info", "--json", self.uri(name)))
        theirs = json.loads(run(["nbdinfo", "--json", "--no-content", self.uri(name)])[1])
        self.assertEqual(ours, theirs)
        self.assertEqual(self.nbd("info", self.uri(name)),
                         run(["nbdinfo", "--no-content", self.uri(name)])[1])
        self.assertEqual(self.nbd("info", "--size", self.uri(name)).strip(),
                         run(["nbdinfo", "--size", self.uri(name)])[1].strip())
        ours = json.loads(self.nbd("list", "--json", self.uri()))
        theirs = json.loads(run(["nbdinfo", "--list", "--json", self.uri()])[1])
        self.assertEqual(ours, theirs)
        self.assertEqual(self.nbd("list", "--long", self.uri()),
                         run(["nbdinfo", "--list", self.uri()])[1])

    def test_our_server(self):
        self.create("raw", MIB + 512, "-f", "raw")
        self.daemon("serve", "--disk", "disk,id=a", "--disk", "raw,format=raw,id=b", "--export",
                    "a,writable,description=the first", "--export", "b", "--nbd", self.uri())
        for name in ("a", "b"):
            self.compare(name)
        self.assertEqual(self.nbd("list", self.uri()), "a: the first\nb\n")
        self.assertIn("No such file", self.nbd("info", self.uri("c"), status=1))

    @unittest.skipUnless(have("qemu-nbd"), "qemu-nbd is not installed")
    def test_qemu_nbd(self):
        self.serve(["qemu-nbd", "-t", "-r", "-k", self.socket, "-x", "foo", "-D", "text", "-A",
                    "-f", "qcow2", self.path("disk")])
        self.compare("foo")

    @unittest.skipUnless(have("nbdkit"), "nbdkit is not installed")
    def test_nbdkit(self):
        self.serve(["nbdkit", "-f", "-U", self.socket, "memory", "64k"])
        self.compare("")

    def serve(self, command):
        server = subprocess.Popen(command)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        wait_until(lambda: os.path.exists(self.socket), 10, "the server is there")

    def test_nobody_there(self):
        self.assertIn("No such file", self.nbd("info", self.uri(), status=1))
        self.assertIn("one server is expected", self.nbd("list", status=1))

    def test_without_the_kernels_driver(self):
        if os.path.exists("/sys/block/nbd0"):
            self.skipTest("this kernel has the driver")
        for command in (("connect", self.uri()), ("disconnect", "/dev/nbd0")):
            self.assertIn("modprobe nbd", self.nbd(*command, status=1))

    def test_what_makes_no_sense(self):
        for arguments, words in ((("connect",), "a server is expected"),
                                 (("connect", self.uri(), "/dev/sda"), "such as /dev/nbd0"),
                                 (("connect", "-C", "17", self.uri()), "1 to 16"),
                                 (("disconnect", "/dev/nbd"), "such as /dev/nbd0")):
            self.assertIn(words, self.nbd(*arguments, status=1))


if __name__ == "__main__":
    unittest.main()
