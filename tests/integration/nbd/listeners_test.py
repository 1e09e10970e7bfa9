#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Where `minivmm serve` listens, and when it ends of itself."""

import os
import re
import socket
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, run

CID_LOCAL = 1


class Listeners(Scene):
    def setUp(self):
        super().setUp()
        self.create("disk", MIB, "-f", "raw")
        self.disk = ("--disk", "disk,format=raw,id=disk", "--export", "disk,writable")

    def uris(self, server):
        found = [re.search(r"NBD export at (\S+)", line) for line in server.errors.lines]
        return [m.group(1) for m in found if m]

    @unittest.skipUnless(have("nbdinfo"), "nbdinfo is not installed")
    def test_several_at_once_each_with_a_uri_to_paste(self):
        server = self.daemon("serve", *self.disk, "--nbd", f"nbd+unix:///?socket={self.path('a')}",
                             "--nbd", f"nbd+unix:///?socket={self.path('b c')}",
                             "--nbd", "nbd://127.0.0.1:0", "--nbd", "nbd://[::1]:0")
        server.errors.wait(lambda l: "NBD export at nbd://[::1]" in l)
        uris = self.uris(server)
        self.assertEqual(len(uris), 4)
        for uri in uris:
            self.assertEqual(run(["nbdinfo", "--size", uri]), (0, f"{MIB}\n"), uri)
        self.assertEqual(server.stop(), 0)

    def test_once(self):
        server = self.daemon("serve", *self.disk, "--once", "--nbd",
                             f"nbd+unix:///?socket={self.path('a')}")
        # Who only looks is no client yet.
        with socket.socket(socket.AF_UNIX) as looker:
            looker.connect(self.path("a"))
            looker.recv(18)
        one, two = NbdClient(self.path("a"), "disk"), NbdClient(self.path("a"), "disk")
        one.close()
        self.assertEqual(two.read(0, 512), bytes(512))
        two.close()
        self.assertEqual(server.wait(), 0, server.errors.text())
        self.assertFalse(os.path.exists(self.path("a")))

    @unittest.skipUnless(have("nbdinfo"), "nbdinfo is not installed")
    def test_standard_input(self):
        command = [minivmm(), "serve", "--disk", f"{self.path('disk')},format=raw,id=disk",
                   "--export", "disk,name=", "--log-level", "warning", "--nbd"]
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        server = subprocess.Popen([*command, "stdio"], stdin=theirs, stdout=theirs)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        theirs.close()
        ours.settimeout(20)
        self.assertEqual(ours.recv(8), b"NBDMAGIC")
        ours.close()
        self.assertEqual(server.wait(20), 0)
        # What is no socket is none.
        status, text = run([*command, "stdio"], stdin=subprocess.DEVNULL)
        self.assertEqual(status, 1)
        self.assertIn("not a connected socket", text)
        # libnbd hands a listening socket to the command that it starts.
        self.assertEqual(run(["nbdinfo", "--size", "--", "[", *command, "systemd", "--once", "]"]),
                         (0, f"{MIB}\n"))

    def test_a_client_that_is_handed_over(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        server = self.daemon("serve", *self.disk, "--nbd", f"fd:{theirs.fileno()}",
                             extra_fds=(theirs.fileno(),))
        theirs.close()
        self.assertEqual(ours.recv(8), b"NBDMAGIC")
        ours.close()
        self.assertEqual(server.wait(), 0, server.errors.text())

    def test_vsock(self):
        try:
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
                probe.bind((CID_LOCAL, socket.VMADDR_PORT_ANY))
        except OSError as e:
            self.skipTest(f"no vsock loopback here: {e}")
        server = self.daemon("serve", *self.disk, "--nbd", f"nbd+vsock://{CID_LOCAL}:4321")
        client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        client.connect((CID_LOCAL, 4321))
        self.assertEqual(client.recv(8), b"NBDMAGIC")
        client.close()
        self.assertIn(f"nbd+vsock://{CID_LOCAL}:4321/disk", self.uris(server))
        self.assertEqual(server.stop(), 0)

    def test_vsock_beyond_loopback_needs_a_word(self):
        text = self.refused("serve", *self.disk, "--nbd", "nbd+vsock://4294967295")
        self.assertIn("--nbd-allow-remote", text)


if __name__ == "__main__":
    unittest.main()
