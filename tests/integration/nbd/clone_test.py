#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Clone exports with real clients: a disk of its own for each of many, off one image."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, run, wait_until


class Clones(Scene):
    SIZE = 8 * MIB

    def setUp(self):
        super().setUp()
        self.content = self.random.randbytes(self.SIZE)
        with open(self.path("golden.raw"), "wb") as f:
            f.write(self.content)
        self.tool("convert", "-f", "raw", "-O", "qcow2", self.path("golden.raw"),
                  self.path("golden"))
        self.golden_sum = self.sum("golden")

    def sum(self, name):
        with open(self.path(name), "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()

    def serve(self, clone="clone", *more, **options):
        self.socket = self.path("m.sock")
        return self.daemon("serve", "--disk", "golden,id=golden,ro", "--export", f"golden,{clone}",
                           "--nbd", f"nbd+unix:///?socket={self.socket}", *more, **options)

    def uri(self, export="golden"):
        return f"nbd+unix:///{export}?socket={self.socket}"

    def client(self, export="golden"):
        out = NbdClient(self.socket, export)
        self.addCleanup(out.close)
        return out

    def state(self, server):
        at = server.errors.count()
        server.send(signal.SIGUSR1)
        end, _ = server.errors.wait(lambda l: "NBD payload memory" in l, at)
        return "\n".join(server.errors.lines[at:end])

    def wait_without_clones(self, server):
        wait_until(lambda: ".clone" not in self.state(server), 10, "every clone is closed")

    def end(self, server):
        self.assertEqual(server.stop(), 0, server.errors.text())
        self.assertEqual(self.sum("golden"), self.golden_sum, "the golden image was written to")

    def test_many_at_once_and_nothing_is_left(self):
        server = self.serve()
        fds = len(os.listdir(f"/proc/{server.pid}/fd"))
        clients = [self.client() for _ in range(100)]
        for number, client in enumerate(clients):
            client.write(number * 4096, bytes([number]) * 4096)
        for number, client in enumerate(clients):
            wanted = bytearray(self.content[:100 * 4096])
            wanted[number * 4096:(number + 1) * 4096] = bytes([number]) * 4096
            self.assertEqual(client.read(0, 100 * 4096), bytes(wanted))
        for client in clients[:50]:
            client.close()
        wait_until(lambda: self.state(server).count("user NBD clone 'golden'") == 50, 10,
                   "50 clones are left")
        for client in clients[50:]:
            client.close()
        self.wait_without_clones(server)
        wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= fds, 10,
                   "no descriptor is left")
        self.end(server)

    def test_in_files_without_a_name(self):
        server = self.serve("clone=qcow2", env={"TMPDIR": self.dir})
        before = sorted(os.listdir(self.dir))
        one, two = self.client(), self.client()
        one.write(0, b"1" * 65536)
        two.write(0, b"2" * 65536)
        one.flush()
        self.assertEqual(one.read(0, 65536), b"1" * 65536)
        self.assertEqual(two.read(65536, 65536), self.content[65536:131072])
        self.assertEqual(sorted(os.listdir(self.dir)), before)
        one.close()
        two.close()
        self.wait_without_clones(server)
        self.end(server)

    def test_a_killed_client_leaves_nothing(self):
        server = self.serve()
        child = subprocess.Popen(
            [sys.executable, "-c",
             "import sys, time; sys.path.insert(0, sys.argv[1])\n"
             "from harness.nbd import NbdClient\n"
             "c = NbdClient(sys.argv[2], 'golden'); c.write(0, b'x' * 65536)\n"
             "print('here', flush=True); time.sleep(60)",
             os.path.join(os.path.dirname(__file__), "..", "..", "support"), self.socket],
            stdout=subprocess.PIPE)
        self.assertEqual(child.stdout.readline(), b"here\n")
        self.assertIn("golden.clone0", self.state(server))
        child.kill()
        child.communicate()
        self.wait_without_clones(server)
        self.end(server)

    def test_a_name_has_one_disk_and_loses_it_at_its_end(self):
        server = self.serve()
        one, two = self.client("golden/alice"), self.client("golden/alice")
        one.write(0, b"a" * 4096)
        self.assertEqual(two.read(0, 4096), b"a" * 4096)
        one.close()
        two.close()
        self.wait_without_clones(server)
        self.assertEqual(self.client("golden/alice").read(0, 4096), self.content[:4096])
        self.end(server)

    def test_kept_disks_come_back(self):
        os.mkdir(self.path("kept"))
        kept = self.path("kept/golden@alice.qcow2")
        server = self.serve(f"clone=qcow2,clone-dir={self.path('kept')}")
        alice, nobody = self.client("golden/alice"), self.client()
        alice.write(4096, b"a" * 4096)
        nobody.write(4096, b"n" * 4096)
        alice.flush()
        self.assertEqual(os.listdir(self.path("kept")), ["golden@alice.qcow2"])
        self.assertEqual(os.stat(kept).st_mode & 0o777, 0o600)
        # What was flushed is there, however the server ends.
        server.kill()
        server = self.serve(f"clone=qcow2,clone-dir={self.path('kept')}")
        alice = self.client("golden/alice")
        self.assertEqual(alice.read(0, 8192), self.content[:4096] + b"a" * 4096)
        alice.write(0, b"b" * 4096)
        alice.close()
        self.wait_without_clones(server)
        self.assertEqual(self.client("golden/alice").read(0, 4096), b"b" * 4096)
        self.end(server)
        # It is an overlay like any other.
        self.check("kept/golden@alice.qcow2")
        info = json.loads(self.tool("info", "--output=json", kept))
        self.assertEqual((info["backing-filename"], info["backing-filename-format"]),
                         (self.path("golden"), "qcow2"))

    def test_a_kept_disk_is_refused_on_another_base(self):
        os.mkdir(self.path("kept"))
        clone = f"clone=qcow2,clone-dir={self.path('kept')}"
        server = self.serve(clone)
        self.client("golden/alice").write(0, b"a" * 4096)
        self.end(server)
        self.create("golden", 2 * self.SIZE, "-f", "qcow2")
        server = self.serve(clone)
        with self.assertRaises(OSError):
            NbdClient(self.socket, "golden/alice")
        server.errors.wait(lambda l: "was made for another base" in l)
        self.assertEqual(self.client("golden/bob").read(0, 16), bytes(16))
        self.assertEqual(server.stop(), 0)

    def fill(self, client, length=None):
        """Writes until there is no room; returns how much there was."""
        for offset in range(0, length or self.SIZE, 65536):
            try:
                client.write(offset, b"f" * 65536)
            except OSError as e:
                self.assertEqual(e.errno, errno.ENOSPC)
                return offset
        self.fail("there was no bound")

    def has_room(self, client, offset):
        try:
            client.write(offset, b"g" * 65536)
            return True
        except OSError as e:
            self.assertEqual(e.errno, errno.ENOSPC)
            return False

    def test_a_clone_that_is_full_says_so_and_works_on(self):
        for kind in ("memory", "qcow2"):
            server = self.serve(f"clone={kind},clone-limit=2M")
            full, other = self.client(), self.client()
            room = self.fill(full)
            self.assertGreater(room, MIB)
            self.assertLess(room, 2 * MIB)
            full.flush()
            self.assertEqual(full.read(0, room), b"f" * room)
            self.assertEqual(full.read(room + 65536, 65536),
                             self.content[room + 65536:room + 131072])
            # What is given back can be used again, once it is free.
            full.trim(0, MIB)
            full.flush()
            for offset in range(room, room + MIB // 2, 65536):
                wait_until(lambda at=offset: self.has_room(full, at), 10, "there is room again")
            full.flush()
            self.assertEqual(full.read(room, MIB // 2), b"g" * (MIB // 2))
            other.write(0, b"o" * MIB)
            self.end(server)

    def test_all_share_a_bound(self):
        server = self.serve("clone,clone-total=3M")
        one, two = self.client(), self.client()
        room = self.fill(one)
        with self.assertRaises(OSError) as caught:
            two.write(0, b"2" * MIB)
        self.assertEqual(caught.exception.errno, errno.ENOSPC)
        one.close()
        wait_until(lambda: "golden.clone0'" not in self.state(server), 10, "the first is gone")
        self.assertGreater(self.fill(two), room - MIB // 2)
        self.end(server)

    @unittest.skipUnless(have("qemu-io", "nbdinfo", "nbdcopy"), "no NBD clients of others")
    def test_other_programs(self):
        server = self.serve()
        info = json.loads(run(["nbdinfo", "--json", self.uri()])[1])["exports"][0]
        self.assertEqual((info["export-size"], info["is_read_only"], info["can_multi_conn"]),
                         (self.SIZE, False, False))
        info = json.loads(run(["nbdinfo", "--json", self.uri("golden/alice")])[1])["exports"][0]
        self.assertTrue(info["can_multi_conn"])
        status, text = run(["nbdinfo", "--list", self.uri("")])
        self.assertEqual(status, 0, text)
        self.assertIn('export="golden"', text)
        status, text = run(["qemu-io", "-f", "raw", self.uri(), "-c", "write -P 7 1M 64k",
                            "-c", "read -P 7 1M 64k", "-c", "discard 2M 1M", "-c", "flush"])
        self.assertEqual(status, 0, text)
        # Gone with that client, and what is read is the image.
        status, text = run(["nbdcopy", self.uri(), self.path("copy.raw")])
        self.assertEqual(status, 0, text)
        self.assertEqual(self.sum("copy.raw"), self.sum("golden.raw"))
        # A map shows what the clone holds and what the base.
        holder = self.client("golden/bob")
        holder.write(0, b"h" * 65536)
        text = run(["nbdinfo", "--map=qemu:allocation-depth", "--json", self.uri("golden/bob")])[1]
        self.assertEqual([(e["offset"], e["length"], e["type"]) for e in json.loads(text)],
                         [(0, 65536, 1), (65536, self.SIZE - 65536, 2)])
        self.end(server)

    def test_the_base_has_no_writers(self):
        text = self.refused("serve", "--disk", "golden,id=golden", "--export", "golden,writable",
                            "--export", "golden,name=clones,clone", "--nbd",
                            f"nbd+unix:///?socket={self.path('m.sock')}")
        self.assertIn("NBD clone export 'clones'", text)
        self.assertIn("NBD export 'golden'", text)

    def test_options_that_do_not_go_together(self):
        for options, word in (("clone=disk", "memory or qcow2"), ("clone-limit=1M", "go with 'clone'"),
                              ("clone,fuse", "only NBD"), ("clone,clone-dir=/tmp", "clone=qcow2"),
                              ("clone=qcow2,clone-dir=/tmp,name=a/b", "give name=")):
            text = self.refused("serve", "--disk", "golden,id=golden,ro", "--export",
                                f"golden,{options}", "--nbd", "nbd://127.0.0.1:0")
            self.assertIn(word, text)


if __name__ == "__main__":
    unittest.main()
