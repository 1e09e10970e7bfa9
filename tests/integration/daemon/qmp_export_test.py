#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Nodes, exports, listeners and mounts come and go by the control socket, while others use theirs.
All of it with the threads' filters of system calls in effect: what is opened late is an errand."""

import errno
import os
import signal
import socket
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.qmp import ControlScene, Qmp, QmpError
from harness.nbd import NbdClient
from harness.scene import MIB, have, is_mounted, run, wait_until

QMP = ("--qmp", "unix:c.sock")
UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")


class ExportScene(ControlScene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")
        self.create("other", 4 * MIB, "-f", "qcow2")

    def serve(self, *arguments):
        self.running = self.daemon("serve", "--disk", "disk,id=disk0", *QMP, *arguments)
        self.connect()

    def add_node(self, name="other", file="other", **more):
        self.qmp.command("blockdev-add", driver="qcow2", node_name=name,
                         file={"driver": "file", "filename": file}, **more)

    def ended(self):
        self.assert_ended(self.running, 0, signal.SIGTERM)
        for image in ("disk", "other"):
            self.check(image)


class Nodes(ExportScene):
    def test_a_node_comes_and_goes(self):
        self.serve()
        self.add_node()
        self.assertIn("other.file", [n["node-name"] for n in
                                     self.qmp.command("query-named-block-nodes")])
        self.refuses("node-name 'other' is taken", "blockdev-add", driver="qcow2",
                     node_name="other", file={"driver": "file", "filename": "other"})
        self.refuses("already open for writing by node 'other.file'", "blockdev-add",
                     driver="qcow2", node_name="twice", file={"driver": "file", "filename": "other"})
        # Its file is in use by it.
        self.refuses("is in use by", "blockdev-del", node_name="other.file")
        self.qmp.command("blockdev-del", node_name="other")
        self.assertEqual([n["node-name"] for n in self.qmp.command("query-named-block-nodes")],
                         ["disk0.file", "disk0"])
        self.refuses("no node 'other'", "blockdev-del", node_name="other")
        # Others may have it now.
        self.assertEqual(run(["qemu-io", "-f", "qcow2", "-c", "write 0 512",
                              self.path("other")])[0] if have("qemu-io") else 0, 0)
        self.ended()

    # Reading bitmaps takes a moment, in which nodes that are looked at come and go. Who keeps one
    # keeps its file open: the next would find it in use.
    def test_nodes_come_and_go_while_others_look(self):
        self.create("marked", 8 << 30, "-f", "qcow2")
        for name in "abcdef":
            self.tool("bitmap", "--add", "-g", "512", self.path("marked"), name)
        self.serve()
        done = threading.Event()

        def look():
            with Qmp(self.path("c.sock")) as qmp:
                while not done.is_set():
                    qmp.command("query-named-block-nodes")

        lookers = [threading.Thread(target=look, daemon=True) for _ in range(3)]
        for each in lookers:
            each.start()
        try:
            for _ in range(100):
                self.qmp.command("blockdev-add", driver="qcow2", node_name="marked",
                                 file={"driver": "file", "filename": "marked",
                                       "cache": {"direct": True}})
                self.qmp.command("blockdev-del", node_name="marked")
        finally:
            done.set()
            for each in lookers:
                each.join(30)
        self.ended()

    # A server that takes the connection and says nothing is waited for by whoever named it, and by
    # nobody else.
    def test_a_silent_server_holds_up_only_who_waits_for_it(self):
        self.serve()
        silent = socket.socket(socket.AF_UNIX)
        self.addCleanup(silent.close)
        silent.bind(self.path("silent"))
        silent.listen()
        with Qmp(self.path("c.sock")) as waiting:
            waiting.begin("blockdev-add", driver="raw", node_name="far",
                          file={"driver": "nbd", "server": {"type": "unix", "path": "silent"}})
            peer = silent.accept()[0]
            begin = time.monotonic()
            self.add_node()
            self.assertEqual(len(self.qmp.command("query-named-block-nodes")), 4)
            self.qmp.command("nbd-server-start", uri="nbd+unix:///?socket=m.sock")
            self.qmp.command("block-export-add", type="nbd", id="e", node_name="other")
            self.assertEqual(len(self.nbd("other").read(0, 512)), 512)
            self.qmp.command("block-export-del", id="e", mode="hard")
            self.qmp.command("blockdev-del", node_name="other")
            self.assertLess(time.monotonic() - begin, 5)
            peer.close()
            self.assertIn("error", waiting.answer())
        self.refuses("no node 'far'", "blockdev-del", node_name="far")
        self.ended()

    def test_what_cannot_be_a_node(self):
        self.serve()
        file = {"driver": "file", "filename": "other"}
        for text, options in (
                ("'node-name' must be specified", {"driver": "qcow2", "file": file}),
                ("unknown option 'nope'", {"driver": "qcow2", "node_name": "n", "file": file,
                                           "nope": 1}),
                ("needs a 'driver'", {"node_name": "n"}),
                ("no-such-file", {"driver": "file", "node_name": "n", "filename": "no-such-file"}),
                ("a list is not expected", {"driver": "file", "node_name": "n", "filename": ["x"]})):
            self.refuses(text, "blockdev-add", **options)
        self.assertEqual(len(self.qmp.command("query-named-block-nodes")), 2)

    def test_a_chain_with_a_recorded_backing_file(self):
        self.create("base", 4 * MIB, "-f", "qcow2")
        self.overlay("top", "base", 4 * MIB, base_format="qcow2")
        self.serve(*UNIX)
        self.add_node("top", "top")
        self.qmp.command("block-export-add", type="nbd", id="t", node_name="top", writable=True)
        client = self.nbd("top")
        client.write(0, b"t" * 512)
        self.assertEqual(client.read(0, 1024), b"t" * 512 + bytes(512))
        self.refuses("is in use by NBD export 'top'", "blockdev-del", node_name="top")

    @unittest.skipUnless(have("qemu-img"), "qemu-utils is not installed")
    def test_an_encrypted_disk_and_its_password(self):
        self.tool("create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=sesame", "-o",
                  "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                  self.path("crypt"), "4M")
        self.serve(*UNIX)
        node = {"driver": "qcow2", "node_name": "c", "encrypt": {"key-secret": "s"},
                "file": {"driver": "file", "filename": "crypt"}}
        self.refuses("No secret with id 's'", "blockdev-add", **node)
        self.qmp.command("object-add", qom_type="secret", id="s", data="sesame")
        self.refuses("'s'", "object-add", qom_type="secret", id="s", data="again")
        self.qmp.command("blockdev-add", **node)
        self.qmp.command("object-del", id="s")
        self.refuses("not found", "object-del", id="s")
        self.qmp.command("block-export-add", type="nbd", id="c", node_name="c", writable=True)
        client = self.nbd("c")
        client.write(0, b"secret" * 512)
        self.assertEqual(client.read(0, 6), b"secret")


class Nbd(ExportScene):
    def test_exports_come_and_go_while_others_are_used(self):
        self.serve(*UNIX, "--export", "disk0,writable")
        kept = self.nbd("disk0")
        kept.write(0, b"k" * 4096)
        self.add_node()
        for round in range(20):
            name = f"e{round}"
            self.qmp.command("block-export-add", type="nbd", id=name, node_name="other", name=name,
                             writable=True, description="a new one")
            client = NbdClient(self.path("m.sock"), name)
            client.write(4096 * round, bytes([round + 1]) * 4096)
            in_flight = kept.begin(0, 0, 4096)
            client.close()
            wait_until(lambda: not self.clients_of(name), 10, "the client's end")
            self.qmp.command("block-export-del", id=name)
            self.assertEqual(self.qmp.event("BLOCK_EXPORT_DELETED"), {"id": name})
            self.assertEqual(kept.finish(in_flight), b"k" * 4096)
        self.assertEqual([e["id"] for e in self.qmp.command("query-block-exports")], ["disk0.nbd"])
        self.qmp.command("blockdev-del", node_name="other")
        self.ended()

    def clients_of(self, name):
        return [l for l in self.qmp.command("query-state")["lines"] if f"of '{name}'" in l]

    @unittest.skipUnless(have("nbdinfo"), "libnbd-bin is not installed")
    def test_nbdinfo_sees_it(self):
        self.serve(*UNIX)
        self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0", name="late",
                         description="came later")
        status, text = run(["nbdinfo", f"nbd+unix:///late?socket={self.path('m.sock')}"])
        self.assertEqual(status, 0, text)
        self.assertIn("came later", text)
        self.assertIn("is_read_only: true", text)
        status, text = run(["nbdinfo", "--list", f"nbd+unix:///?socket={self.path('m.sock')}"])
        self.assertIn('export="late"', text)
        self.qmp.command("block-export-del", id="x")
        self.assertNotEqual(
            run(["nbdinfo", f"nbd+unix:///late?socket={self.path('m.sock')}"])[0], 0)

    def test_safe_refuses_and_hard_cuts(self):
        self.serve(*UNIX, "--export", "disk0,writable,name=stays")
        self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0", writable=True)
        client = self.nbd("disk0")
        stays = self.nbd("stays")
        client.write(0, b"c" * 512)
        self.refuses("export 'x' still in use", "block-export-del", id="x")
        self.refuses("export 'x' still in use", "block-export-del", id="x", mode="safe")
        self.assertEqual(client.read(0, 512), b"c" * 512)
        self.qmp.command("block-export-del", id="x", mode="hard")
        with self.assertRaises(OSError):
            client.read(0, 512)
        self.assertEqual(stays.read(0, 512), b"c" * 512)
        with self.assertRaises(OSError):
            NbdClient(self.path("m.sock"), "disk0")
        self.refuses("Export 'x' is not found", "block-export-del", id="x")
        self.ended()

    def test_hard_while_requests_are_in_flight(self):
        """What was answered is there; the rest fails, or its connection does; nothing hangs."""
        self.serve(*UNIX)
        for round in range(5):
            self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0",
                             writable=True)
            client = NbdClient(self.path("m.sock"), "disk0")
            pending = [client.begin(1, 4096 * i, 4096, bytes([round + 1]) * 4096)
                       for i in range(200)]
            self.qmp.command("block-export-del", id="x", mode="hard")
            for each in pending:
                try:
                    client.finish(each, 20)
                except OSError as e:
                    self.assertIn(e.errno, (errno.ECONNRESET, errno.ESHUTDOWN))
            client.close()
        self.ended()

    def test_what_cannot_be_exported(self):
        self.serve(*UNIX, "--export", "disk0")
        good = {"type": "nbd", "id": "x", "node_name": "disk0", "name": "x"}
        for text, change in (
                ("no node 'nope'", {"node_name": "nope"}),
                ("does not accept value 'vhost'", {"type": "vhost"}),
                ("Invalid block export id", {"id": "1 2"}),
                ("id 'disk0.nbd' is already in use", {"id": "disk0.nbd"}),
                ("there is an NBD export 'disk0' already", {"name": "disk0"}),
                ("Bitmap 'b' is not found", {"bitmaps": ["b"]}),
                ("goes with type fuse", {"mountpoint": "x"}),
                ("writethrough", {"writethrough": True}),
                ("expected: array", {"allow": "me"}),
                ("goes with 'clone'", {"clone_limit": 1})):
            self.refuses(text, "block-export-add", **{**good, **change})
        self.assertEqual(len(self.qmp.command("query-block-exports")), 1)
        self.qmp.command("block-export-add", **good)

    def test_a_read_only_node_and_a_backing_file(self):
        self.daemon_disk = self.serve("--disk", "other,id=ro,ro", *UNIX)
        self.refuses("read-only", "block-export-add", type="nbd", id="x", node_name="ro",
                     writable=True)
        # Where there are clones nobody may write to what they are clones of.
        self.qmp.command("block-export-add", type="nbd", id="c", node_name="disk0", name="golden",
                         clone="memory", clone_limit=MIB)
        self.refuses("golden", "block-export-add", type="nbd", id="w", node_name="disk0",
                     name="w", writable=True)
        one, two = self.nbd("golden"), self.nbd("golden")
        one.write(0, b"1" * 512)
        self.assertEqual(two.read(0, 512), bytes(512))

    def test_limits_are_kept(self):
        self.serve(*UNIX)
        self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0",
                         max_connections=1)
        self.nbd("disk0")
        with self.assertRaises(OSError):
            NbdClient(self.path("m.sock"), "disk0")

    def test_listeners_come_and_go(self):
        self.serve()
        self.refuses("NBD server not running", "block-export-add", type="nbd", id="x",
                     node_name="disk0")
        self.refuses("NBD server not running", "nbd-server-stop")
        self.refuses("reachable from other machines", "nbd-server-start",
                     addr={"type": "inet", "host": "0.0.0.0", "port": "0"})
        self.refuses("Parameter 'path' is missing", "nbd-server-start", addr={"type": "unix"})
        self.refuses("NBD server not running", "nbd-server-stop")  # a listener that failed made none
        unix = {"type": "unix", "data": {"path": self.path("m.sock")}}
        uri = self.qmp.command("nbd-server-start", addr=unix)["uri"]
        self.assertEqual(uri, f"nbd+unix:///?socket={self.path('m.sock')}")
        tcp = self.qmp.command("nbd-server-start",
                               addr={"type": "inet", "host": "127.0.0.1", "port": "0"})["uri"]
        port = int(tcp.rsplit(":", 1)[1].rstrip("/"))
        self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0", writable=True)
        one = self.nbd("disk0")
        two = NbdClient(address=("127.0.0.1", port), export="disk0")
        one.write(0, b"o" * 512)
        self.assertEqual(two.read(0, 512), b"o" * 512)
        self.refuses("a process listens there already", "nbd-server-start", addr=unix)
        self.qmp.command("nbd-server-stop")
        self.assertEqual(self.qmp.event("BLOCK_EXPORT_DELETED"), {"id": "x"})
        self.assertFalse(os.path.exists(self.path("m.sock")))
        for client in (one, two):
            with self.assertRaises(OSError):
                client.read(0, 512)
            client.close()
        # And again.
        self.qmp.command("nbd-server-start", uri="nbd+unix:///?socket=m.sock")
        self.qmp.command("block-export-add", type="nbd", id="x", node_name="disk0")
        self.assertEqual(self.nbd("disk0").read(0, 512), b"o" * 512)
        self.ended()


class Fuse(ExportScene):
    def test_files_come_and_go_in_a_mount(self):
        self.serve("--fuse", "mnt", "--export", "disk0,writable")
        self.add_node()
        with open(self.path("mnt/disk0"), "r+b", buffering=0) as kept:
            kept.write(b"k" * 4096)
            for round in range(5):
                self.qmp.command("block-export-add", type="fuse", id="f", node_name="other",
                                 name=f"late{round}", writable=True)
                self.assertEqual(sorted(os.listdir(self.path("mnt"))), ["disk0", f"late{round}"])
                with open(self.path(f"mnt/late{round}"), "r+b", buffering=0) as f:
                    f.write(bytes([round + 1]) * 512)
                    self.refuses("still in use", "block-export-del", id="f")
                wait_until(lambda: self.removed("f"), 10, "the file's closing")
                self.assertEqual(os.listdir(self.path("mnt")), ["disk0"])
            kept.seek(0)
            self.assertEqual(kept.read(4096), b"k" * 4096)
        self.ended()

    def removed(self, id):
        try:
            self.qmp.command("block-export-del", id=id)
            return True
        except QmpError:  # the kernel closes a little later than the program
            return False

    def test_hard_while_it_is_open(self):
        self.serve("--fuse", "mnt", "--export", "disk0,writable")
        with open(self.path("mnt/disk0"), "r+b", buffering=0) as f:
            f.write(b"x" * 512)
            self.qmp.command("block-export-del", id="disk0.fuse", mode="hard")
            self.assertEqual(os.listdir(self.path("mnt")), [])
            with self.assertRaises(OSError):
                f.seek(0)
                f.read(512)
        self.ended()

    def test_files_of_one_directory_come_and_go_at_once(self):
        """The first makes the mount, the last takes it away, whoever that is."""
        self.serve(*UNIX, "--export", "disk0,writable")
        clients = [Qmp(self.path("c.sock")) for _ in range(3)]
        for client in clients:
            self.addCleanup(client.close)

        def all_at_once(name, arguments):
            for number, client in enumerate(clients):
                client.begin(name, **arguments(number))
            self.assertEqual([client.answer() for client in clients], [{"return": {}}] * 3)

        for _ in range(5):
            all_at_once("block-export-add", lambda n: {
                "type": "fuse", "id": f"f{n}", "node_name": "disk0",
                "mountpoint": self.path(f"late/{n}.img")})
            self.assertEqual(sorted(os.listdir(self.path("late"))), ["0.img", "1.img", "2.img"])
            all_at_once("block-export-del", lambda n: {"id": f"f{n}"})
            self.assertFalse(os.path.exists(self.path("late")))
        # One comes while the last goes.
        for _ in range(5):
            clients[0].command("block-export-add", type="fuse", id="a", node_name="disk0",
                               mountpoint=self.path("late/a.img"))
            clients[0].begin("block-export-del", id="a")
            clients[1].command("block-export-add", type="fuse", id="b", node_name="disk0",
                               mountpoint=self.path("late/b.img"))
            self.assertEqual(clients[0].answer(), {"return": {}})
            self.assertEqual(os.listdir(self.path("late")), ["b.img"])
            clients[1].command("block-export-del", id="b")
        self.ended()

    def test_mounts_are_made_where_there_are_none(self):
        self.serve(*UNIX, "--export", "disk0,writable")
        self.refuses("there is no FUSE mount", "block-export-add", type="fuse", id="a",
                     node_name="disk0")
        self.add_node()
        self.qmp.command("block-export-add", type="fuse", id="a", node_name="disk0",
                         mountpoint=self.path("late/a.img"), writable=True)
        self.qmp.command("block-export-add", type="fuse", id="b", node_name="other",
                         mountpoint="late/b.img")
        self.assertEqual(sorted(os.listdir(self.path("late"))), ["a.img", "b.img"])
        self.assertEqual(os.stat(self.path("late/b.img")).st_size, 4 * MIB)
        with open(self.path("late/a.img"), "r+b", buffering=0) as f:
            f.write(b"a" * 4096)
            os.fsync(f.fileno())
        self.assertEqual(self.nbd("disk0").read(0, 4096), b"a" * 4096)
        self.qmp.command("block-export-del", id="a", mode="hard")
        self.assertEqual(os.listdir(self.path("late")), ["b.img"])
        self.qmp.command("block-export-del", id="b", mode="hard")
        # It went with its last file.
        self.assertFalse(is_mounted(self.path("late")))
        self.assertFalse(os.path.exists(self.path("late")))
        self.qmp.command("block-export-add", type="fuse", id="a", node_name="disk0",
                         mountpoint="late/a.img")
        self.ended()
        self.assertFalse(os.path.exists(self.path("late")))

    def test_what_cannot_be_flushed_goes_all_the_same(self):
        self.serve(*UNIX)
        self.create("raw", MIB, "-f", "raw")
        self.qmp.command("blockdev-add", driver="fault", node_name="bad", op="flush",
                         file={"driver": "file", "filename": "raw"})
        for more in ({"type": "nbd", "name": "bad"},
                     {"type": "fuse", "mountpoint": self.path("late/bad.img")}):
            self.qmp.command("block-export-add", id="x", node_name="bad", writable=True, **more)
            if more["type"] == "nbd":
                client = self.nbd("bad")
                client.write(0, b"n" * 512)
                client.close()
            else:
                with open(self.path("late/bad.img"), "r+b", buffering=0) as f:
                    f.write(b"f" * 512)
            self.refuses("injected fault", "block-export-del", id="x", mode="hard")
            self.assertEqual(self.qmp.event("BLOCK_EXPORT_DELETED"), {"id": "x"})
            self.assertEqual(self.qmp.command("query-block-exports"), [])
        # With the mount that was made for it.
        self.assertFalse(is_mounted(self.path("late")))
        self.qmp.command("blockdev-del", node_name="bad")
        self.ended()

    def test_where_nothing_can_be_mounted(self):
        os.mkdir(self.path("full"))
        with open(self.path("full/x"), "w", encoding="ascii"):
            pass
        self.serve()
        self.refuses("full", "block-export-add", type="fuse", id="a", node_name="disk0",
                     mountpoint="full/a")
        self.refuses("names a directory", "block-export-add", type="fuse", id="a",
                     node_name="disk0", mountpoint="new/")
        self.assertEqual(self.qmp.command("query-block-exports"), [])
        self.qmp.command("blockdev-del", node_name="disk0")  # nobody uses it


if __name__ == "__main__":
    unittest.main(verbosity=2)
