#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`minivmm nbd info` and `list` beside nbdinfo, on our server and on others'. (connect is tested where
there is a kernel with the driver: tests/system/nbd.)"""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
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

    def same(self, ours, theirs):
        """The same text and the same exit status."""
        self.assertEqual(run([minivmm(), "nbd", "info", *ours, self.uri()]),
                         run(["nbdinfo", *theirs, self.uri()]), ours)

    @unittest.skipUnless(have("nbdkit", "qemu-nbd", "qemu-img", "qemu-io"), "peers are not there")
    def test_maps(self):
        self.create("over", 10 * MIB, "-f", "qcow2", "-b", self.path("disk"), "-F", "qcow2")
        for name, commands in (("disk", ("write 0 64k", "write 1M 1M", "write -z 4M 1M")),
                               ("over", ("write 64k 64k", "write -z 1M 128k"))):
            for command in commands:
                subprocess.run(["qemu-io", "-c", command, self.path(name)], check=True,
                               stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "bitmap", "--add", self.path("over"), "b"], check=True)
        subprocess.run(["qemu-io", "-c", "write 3M 64k", self.path("over")], check=True,
                       stdout=subprocess.DEVNULL)
        for command, contexts in (
                (["qemu-nbd", "-t", "-r", "-A", "-B", "b", "-k", self.socket, "-f", "qcow2",
                  self.path("over")],
                 ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b", "x:y")),
                (["nbdkit", "-f", "-U", self.socket, "data", "1 @1000 2 @5000 3 @40000000000 4"],
                 ("base:allocation", "x:y")),
                (["nbdkit", "-f", "-U", self.socket, "memory", "0"], ("base:allocation",)),
                (["nbdkit", "-f", "--no-sr", "-U", self.socket, "memory", "4k"],
                 ("base:allocation",))):
            server = self.serve(command)
            self.same([], ["--no-content"])
            for context in contexts:
                for more in ([], ["--totals"]):
                    ours = ["--map", "--context", context, *more]
                    theirs = [f"--map={context}", *more]
                    status, text = run(["nbdinfo", *theirs, self.uri()])
                    if status != 0:
                        self.assertIn("does not support metadata context",
                                      self.nbd("info", *ours, self.uri(), status=status))
                        continue
                    self.same(ours, theirs)
                    mine = json.loads(self.nbd("info", *ours, "--json", self.uri()))
                    self.assertEqual(
                        mine, json.loads(run(["nbdinfo", *theirs, "--json", self.uri()])[1]))
            for what in ("connect", "read", "write", "cache", "df", "fast-zero", "flush", "fua",
                         "multi-conn", "trim", "zero"):
                self.same(["--can", what], ["--can", what])
            for what in ("read-only", "rotational", "tls"):
                self.same(["--is", what], ["--is", what])
            server.kill()
            server.wait()
            os.unlink(self.socket)
        self.assertIn("go with --map", self.nbd("info", "--totals", self.uri(), status=1))

    def test_tls_by_an_object(self):
        with open(self.path("keys.psk"), "w", encoding="ascii") as keys:
            keys.write("alice:" + os.urandom(32).hex() + "\n")
        self.daemon("serve", "--disk", "disk,id=a", "--export", "a,allow=alice", "--nbd",
                    f"{self.uri()},tls-creds=k",
                    "--object", f"tls-creds-psk,id=k,endpoint=server,dir={self.dir}")
        alice = ("--object", f"tls-creds-psk,id=c,endpoint=client,username=alice,dir={self.dir}",
                 "--tls-creds", "c")
        self.assertEqual(self.nbd("list", *alice, self.uri()), "a\n")
        self.nbd("info", "--is", "tls", *alice, self.uri("a"))
        self.nbd("list", self.uri(), status=1)
        self.assertIn("No TLS credentials", self.nbd("list", "--tls-creds", "c", self.uri(), status=1))
        self.assertIn("goes with TLS", self.nbd("connect", "--tls-hostname", "a", self.uri(), status=1))

    def serve(self, command):
        server = subprocess.Popen(command)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        wait_until(lambda: os.path.exists(self.socket), 10, "the server is there")
        return server

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


class Endless(Scene):
    """A server that answers without end. What the commands keep of it is bounded: they say so and
    end."""

    INFO, LIST, GO, STRUCTURED, LIST_META, SET_META = 6, 3, 7, 8, 9, 10
    ACK, SERVER, EXPORT, META, UNSUP = 1, 2, 3, 4, 0x80000001
    SIZE = 1 << 40

    def serve(self, endless):
        self.endless = endless
        listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(listener.close)
        listener.bind(self.path("s"))
        listener.listen()
        threading.Thread(target=self.talk, args=(listener,), daemon=True).start()

    def talk(self, listener):
        peer, _ = listener.accept()
        with peer:
            try:
                self.handshake(peer, peer.makefile("rb"))
            except (OSError, struct.error):
                pass  # the client has left

    def reply(self, option, kind, data=b""):
        return struct.pack(">QIII", 0x3e889045565a9, option, kind, len(data)) + data

    def handshake(self, peer, source):
        peer.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        source.read(4)
        name = b"x" * 4000
        while True:
            _, option, length = struct.unpack(">QII", source.read(16))
            source.read(length)
            pieces = {self.LIST: (self.SERVER, struct.pack(">I", len(name)) + name),
                      self.LIST_META: (self.META, struct.pack(">I", 1) + name)}
            if option == self.endless:
                while True:
                    peer.sendall(16 * self.reply(option, *pieces[option]))
            if option not in (self.INFO, self.LIST, self.GO, self.STRUCTURED, self.SET_META):
                peer.sendall(self.reply(option, self.UNSUP))
                continue
            if option in (self.INFO, self.GO):
                peer.sendall(self.reply(option, self.EXPORT,
                                        struct.pack(">HQH", 0, self.SIZE, 1)))
            if option == self.LIST:
                peer.sendall(self.reply(option, self.SERVER, struct.pack(">I", 1) + b"a"))
            if option == self.SET_META:
                peer.sendall(self.reply(option, self.META,
                                        struct.pack(">I", 1) + b"base:allocation"))
            peer.sendall(self.reply(option, self.ACK))
            if option == self.GO:
                return self.answer_for_extents(peer, source)

    def answer_for_extents(self, peer, source):
        """Every one is of another type."""
        kind = 0
        while True:
            _, _, _, cookie, _, _ = struct.unpack(">IHHQQI", source.read(28))
            count = 4096
            extents = b"".join(struct.pack(">II", 512, kind + i) for i in range(count))
            kind += count
            peer.sendall(struct.pack(">IHHQII", 0x668e33ef, 1, 5, cookie, 4 + len(extents), 1) +
                         extents)

    def refused(self, *arguments):
        status, text = run([minivmm(), "nbd", *arguments, f"nbd+unix:///?socket={self.path('s')}"],
                           limit=30)
        self.assertEqual(status, 1, text[:1000])
        return text

    def test_names(self):
        self.serve(self.LIST)
        self.assertIn("the server tells too much: more than 16 MiB", self.refused("list"))

    def test_names_of_all(self):
        self.serve(self.LIST)
        self.assertIn("the server tells too much", self.refused("list", "--json"))

    def test_contexts(self):
        for arguments in (("info",), ("list", "--long")):
            self.serve(self.LIST_META)
            self.assertIn("the server tells too much", self.refused(*arguments))
            os.unlink(self.path("s"))

    def test_an_output_that_takes_nothing_is_an_error(self):
        self.serve(None)
        with open("/dev/full", "wb") as full:
            done = subprocess.run([minivmm(), "nbd", "info", "--map",
                                   f"nbd+unix:///?socket={self.path('s')}"],
                                  stdout=full, stderr=subprocess.PIPE, timeout=30)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(b"No space left", done.stderr)

    def test_kinds(self):
        self.serve(None)
        self.assertIn("more than 100000 kinds", self.refused("info", "--map", "--totals"))


if __name__ == "__main__":
    unittest.main()
