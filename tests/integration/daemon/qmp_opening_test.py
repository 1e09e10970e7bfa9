#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""blockdev-add of a disk whose NBD server lets us in and then answers nothing: no other client of the
control socket waits for it, and it ends when it is deleted, or with the daemon."""

import os
import signal
import socket
import struct
import sys
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import IHAVEOPT, NBDMAGIC, OPT_GO, REP_ACK, REP_INFO
from harness.qmp import ControlScene, Qmp
from harness.scene import MIB

REP_MAGIC = 0x0003E889045565A9
REP_UNSUPPORTED = 0x80000001


class MuteServer:
    """Does the handshake and then only listens. `asked`: a request has come."""

    def __init__(self, path):
        self.asked = threading.Event()
        self.clients = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.clients.append(client)
            threading.Thread(target=self.talk, args=(client,), daemon=True).start()

    def talk(self, client):
        try:
            client.sendall(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3))
            self.exactly(client, 4)
            while not self.option(client):
                pass
            while client.recv(4096):
                self.asked.set()
        except OSError:
            pass

    def option(self, client):
        """True: transmission begins."""
        _, option, length = struct.unpack(">QII", self.exactly(client, 16))
        self.exactly(client, length)

        def reply(kind, data=b""):
            client.sendall(struct.pack(">QIII", REP_MAGIC, option, kind, len(data)) + data)

        if option != OPT_GO:
            reply(REP_UNSUPPORTED)
            return False
        reply(REP_INFO, struct.pack(">HQH", 0, 16 * MIB, 5))
        reply(REP_ACK)
        return True

    @staticmethod
    def exactly(client, size):
        data = b""
        while len(data) < size:
            piece = client.recv(size - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    def close(self):
        self.listener.close()
        for client in self.clients:
            client.close()


class Opening(ControlScene):
    def setUp(self):
        super().setUp()
        self.create("near", 4 * MIB, "-f", "raw")
        self.mute = MuteServer(self.path("mute.sock"))
        self.addCleanup(self.mute.close)
        self.near = self.daemon("serve", "--disk", "near,id=near,format=raw", "--qmp",
                                "unix:c.sock", "--nbd", "nbd+unix:///?socket=m.sock")
        self.connect()
        self.other = Qmp(self.path("c.sock"), limit=20)
        self.addCleanup(self.other.close)

    def begin_far(self, driver="qcow2"):
        self.qmp.begin("blockdev-add", driver=driver, node_name="far",
                       file={"driver": "nbd", "path": self.path("mute.sock")})
        self.assertTrue(self.mute.asked.wait(20))

    def use_the_graph(self):
        """What another client does meanwhile."""
        names = [each["node-name"] for each in self.other.command("query-named-block-nodes")]
        self.assertEqual(names, ["near.file", "near"])
        self.other.command("blockdev-add", driver="memory", node_name="m", size=MIB)
        self.other.command("block-export-add", type="nbd", id="m", node_name="m", writable=True)
        self.nbd("m").write(0, b"x" * 4096)
        self.other.command("block-export-del", id="m", mode="hard")
        self.other.command("blockdev-del", node_name="m")
        self.other.begin("blockdev-add", driver="memory", node_name="far", size=MIB)
        self.assertIn("is being opened", self.other.answer()["error"]["desc"])

    def assert_unanswered(self):
        self.qmp.socket.settimeout(0)
        with self.assertRaises(BlockingIOError):
            while True:
                self.assertIn("event", self.qmp.receive())
        self.qmp.socket.settimeout(30)

    def test_deleting_it_ends_it(self):
        self.begin_far()
        self.use_the_graph()
        self.assert_unanswered()
        lines = self.other.command("query-state")["lines"]
        self.assertIn("the opening of 'far' is under way", lines)
        self.assertEqual(self.other.command("blockdev-del", node_name="far"), {})
        self.assertIn("'far' was given up: the node was deleted",
                      self.qmp.answer()["error"]["desc"])
        self.qmp.command("blockdev-add", driver="memory", node_name="far", size=MIB)
        self.assert_ended(self.near, 0, signal.SIGTERM)

    def test_the_end_of_the_daemon_ends_it(self):
        self.begin_far("luks")
        self.use_the_graph()
        self.other.command("quit")
        self.assertIn("'far' was given up: all nodes are being closed",
                      self.qmp.answer()["error"]["desc"])
        self.assert_ended(self.near, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
