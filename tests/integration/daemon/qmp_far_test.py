#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A disk on an NBD server that hangs: deleting it comes to an end, says what may be lost, and holds
up no other client of the control socket."""

import os
import select
import signal
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import CMD_READ
from harness.qmp import ControlScene, Qmp, QmpError
from harness.scene import MIB, wait_until


class Far(ControlScene):
    def setUp(self):
        super().setUp()
        self.create("disk", 4 * MIB, "-f", "raw")
        self.create("near", 4 * MIB, "-f", "raw")
        self.far = self.daemon("serve", "--disk", "disk,id=far,format=raw", "--export",
                               "far,writable", "--nbd", "nbd+unix:///?socket=far.sock")
        self.near = self.daemon("serve", "--disk", "near,id=near,format=raw", "--qmp",
                                "unix:c.sock", "--nbd", "nbd+unix:///?socket=m.sock")
        self.connect()
        self.other = Qmp(self.path("c.sock"))
        self.addCleanup(self.other.close)

    def add_far(self, **more):
        self.qmp.command("blockdev-add", driver="nbd", node_name="far",
                         uri="nbd+unix:///far?socket=far.sock", **more)

    def hang(self):
        """From here on the server says nothing."""
        self.far.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.far.pid, os.WSTOPPED | os.WNOWAIT)

    def nodes(self, client):
        return [each["node-name"] for each in client.command("query-named-block-nodes")]

    def use_the_graph(self):
        """What another client does meanwhile."""
        self.assertIn("near", self.nodes(self.other))
        self.use_the_graph_unseen()

    def use_the_graph_unseen(self):
        self.other.command("blockdev-add", driver="memory", node_name="m", size=MIB)
        self.other.command("block-export-add", type="nbd", id="m", node_name="m", writable=True)
        self.nbd("m").write(0, b"x" * 4096)
        self.other.command("block-export-del", id="m", mode="hard")
        self.other.command("blockdev-del", node_name="m")

    def assert_unanswered(self, client):
        client.socket.settimeout(0)
        with self.assertRaises(BlockingIOError):
            while True:
                self.assertIn("event", client.receive())
        client.socket.settimeout(30)

    def ended(self):
        self.far.send(signal.SIGCONT)
        self.assert_ended(self.near, 0, signal.SIGTERM)
        self.assert_ended(self.far, 0, signal.SIGTERM)

    def test_a_node_that_was_not_written_to_goes_with_a_warning(self):
        self.add_far(request_timeout=1)
        self.hang()
        self.qmp.begin("blockdev-del", node_name="far")
        wait_until(lambda: "far" not in self.nodes(self.other), 5, "the node is taken out")
        began = time.monotonic()
        self.use_the_graph()
        if time.monotonic() - began < 0.7:  # the server is waited for longer than that
            self.assert_unanswered(self.qmp)
        self.assertEqual(self.qmp.answer()["return"], {})
        self.near.errors.wait(lambda line: "did not end the connection" in line)
        self.ended()

    def test_what_may_be_lost_is_an_error(self):
        self.add_far(request_timeout=1, reconnect_delay=60)
        self.qmp.command("block-export-add", type="nbd", id="far", node_name="far", writable=True)
        client = self.nbd("far")
        client.write(0, b"y" * 8192)
        client.close()
        self.hang()
        with self.assertRaises(QmpError) as caught:
            self.qmp.command("block-export-del", id="far", mode="hard")
        self.assertIn("flushing has not ended", caught.exception.desc)
        # The export still waits for its flush. The deletion ends that.
        self.qmp.begin("blockdev-del", node_name="far")
        self.use_the_graph()
        error = self.qmp.answer()["error"]["desc"]
        self.assertIn("node 'far' is gone", error)
        self.assertIn("8192 bytes that the server acknowledged were not flushed", error)
        self.assertEqual(self.nodes(self.other), ["near.file", "near"])
        self.ended()

    def test_an_export_that_goes_slowly_holds_up_no_other(self):
        self.add_far()
        self.qmp.command("block-export-add", type="nbd", id="far", node_name="far", writable=True)
        client = self.nbd("far")
        client.write(0, b"z" * 4096)
        client.close()
        self.hang()
        began = time.monotonic()
        while True:
            # Its client has left, which the server may not have noticed yet.
            self.qmp.begin("block-export-del", id="far")
            wait_until(lambda: self.going(self.other, "far") or self.has_answer(), 20,
                       "the export goes")
            if self.going(self.other, "far"):
                break
            self.assertIn("still in use", self.qmp.answer()["error"]["desc"])
        self.use_the_graph()
        self.other.begin("block-export-add", type="nbd", id="far", node_name="near")
        self.assertIn("already in use", self.other.answer()["error"]["desc"])
        self.other.begin("block-export-del", id="far", mode="hard")
        self.assertIn("already shutting down", self.other.answer()["error"]["desc"])
        if time.monotonic() - began < 7:  # the flush is waited for longer than that
            self.assert_unanswered(self.qmp)
        self.far.send(signal.SIGCONT)
        self.assertEqual(self.qmp.answer(), {"return": {}})
        self.other.begin("block-export-del", id="far")
        self.assertIn("is not found", self.other.answer()["error"]["desc"])
        self.ended()

    def test_who_asks_for_what_the_server_has_waits_alone(self):
        """The bitmap is read when somebody asks for it."""
        self.open_image("b0")
        self.hang()
        self.qmp.begin("query-named-block-nodes")
        self.other.command("blockdev-add", driver="memory", node_name="m", size=MIB)
        self.other.command("block-export-add", type="nbd", id="m", node_name="m", writable=True)
        self.nbd("m").write(0, b"x" * 4096)
        self.other.command("block-export-del", id="m", mode="hard")
        self.other.command("blockdev-del", node_name="m")
        self.assert_unanswered(self.qmp)
        self.other.begin("blockdev-del", node_name="q")  # waits for it, and is not refused
        self.far.send(signal.SIGCONT)
        names = [each["node-name"] for each in self.qmp.answer()["return"]]
        self.assertEqual(names, ["near.file", "near", "far", "q"])
        self.assertEqual(self.other.answer(), {"return": {}})
        self.ended()

    def open_image(self, *bitmaps, options=(), room=0):
        """A qcow2 image on the server: the node q. Its file cannot grow there."""
        self.create("image.qcow2", 4 * MIB, "-f", "qcow2", *options)
        for name in bitmaps:
            self.tool("bitmap", "--add", self.path("image.qcow2"), name)
        image = self.path("image.qcow2")
        os.truncate(image, os.path.getsize(image) + room)
        self.far.send(signal.SIGTERM)
        self.far.wait(30)
        self.far = self.daemon("serve", "--disk", "image.qcow2,id=far,format=raw", "--export",
                               "far,writable", "--nbd", "nbd+unix:///?socket=far.sock")
        self.qmp.command("blockdev-add", driver="qcow2", node_name="q", file={
            "driver": "nbd", "node-name": "far", "uri": "nbd+unix:///far?socket=far.sock"})

    def test_changes_of_a_disk_wait_for_none_of_another(self):
        self.open_image()
        self.hang()
        self.qmp.begin("block_resize", node_name="q", size=8 * MIB)
        self.other.command("block_resize", node_name="near", size=8 * MIB)
        self.assert_unanswered(self.qmp)
        self.far.send(signal.SIGCONT)
        self.assertEqual(self.qmp.answer(), {"return": {}})
        self.ended()

    def test_a_snapshot_of_another_disk_is_made_meanwhile(self):
        """Only what comes to the disk itself has to stand still for that."""
        self.open_image("b0", options=("-o", "preallocation=falloc"), room=4 * MIB)
        self.create("own.qcow2", 4 * MIB, "-f", "qcow2")
        self.qmp.command("blockdev-add", driver="qcow2", node_name="own", file={
            "driver": "file", "filename": self.path("own.qcow2")})
        for name in ("own", "q"):
            self.qmp.command("block-export-add", type="nbd", id=name, node_name=name, writable=True)
        far, own = self.nbd("q"), self.nbd("own")
        self.hang()
        waiting = far.begin(CMD_READ, 0, 4096)
        self.qmp.begin("query-named-block-nodes")  # waits for the bitmap
        third = Qmp(self.path("c.sock"))
        self.addCleanup(third.close)
        third.begin("blockdev-snapshot-internal-sync", device="q", name="t")
        own.write(0, b"y" * 4096)
        self.other.command("blockdev-snapshot-internal-sync", device="own", name="s")
        self.assertEqual(own.read(0, 4096), b"y" * 4096)
        self.use_the_graph_unseen()
        self.other.command("blockdev-snapshot-delete-internal-sync", device="own", name="s")
        self.assert_unanswered(self.qmp)
        self.assert_unanswered(third)
        self.far.send(signal.SIGCONT)
        self.assertEqual(far.finish(waiting), bytes(4096))
        self.assertEqual(third.answer(), {"return": {}})
        self.assertIn("return", self.qmp.answer())
        far.close()
        own.close()
        self.ended()
        self.check("own.qcow2")
        self.check("image.qcow2")

    def has_answer(self):
        return bool(select.select([self.qmp.socket], [], [], 0)[0])

    @staticmethod
    def going(client, export):
        return any(each["id"] == export and each["shutting-down"]
                   for each in client.command("query-block-exports"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
