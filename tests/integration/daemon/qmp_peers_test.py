#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Our control socket and that of qemu-storage-daemon say the same; our client can speak to both."""

import json
import os
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.qmp import Qmp
from harness.scene import MIB, Scene, have, wait_until

NODE = {"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": None}}


def message(name, /, **arguments):
    return {"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}


# What is sent to both. Where "desc" is True the texts of errors are to be the same, too.
PROTOCOL = (
    ('{"execute": "query-version"}', True),
    ('{"execute": "qmp_capabilities", "arguments": {"enable": ["nope"]}}', False),
    ('{"execute": "qmp_capabilities", "id": "ready"}', True),
    ('{"execute": "qmp_capabilities"}', True),
    ("{}", True), ("[]", True), ('{"execute": 5}', True),
    ('{"execute": "quit", "arguments": []}', True),
    ('{"execute": "quit", "more": 1}', True),
    ('{"execute": "no-such-command", "id": [1, {"x": null}]}', True),
    ('{"execute": "blockdev-del"}', True),
    ('{"execute": "blockdev-del", "arguments": {"node-name": 5}}', True),
    ('{"execute": "blockdev-del", "arguments": {"node-name": "d", "node": "d"}}', True),
    ('{"execute": "block-export-del", "arguments": {"id": "x"}}', True),
    ('{"execute": "block-export-del", "arguments": {"id": "x", "mode": "soft"}}', False),
)


def disk_commands(sock):
    add = message("block-export-add", type="nbd", id="e", node_name="d", writable=True)
    bitmap = {"node": "d", "name": "b"}
    snapshot = {"device": "d", "name": "s"}
    return (
        # (With an export on the disk they refuse to.)
        (message("block_resize", node_name="d", size=16 * MIB), False),
        (add, False), (message("nbd-server-stop"), False),
        (message("nbd-server-start", addr={"type": "unix", "data": {"path": sock}}), False),
        (add, False), (add, True),
        (message("blockdev-del", node_name="d"), False),
        (message("block_resize", node_name="d", size="16M"), True),
        (message("block_resize", node_name="nope", size=MIB), False),
        (message("block-dirty-bitmap-add", **bitmap, persistent=True), False),
        (message("block-dirty-bitmap-add", **bitmap, persistent=True), True),
        (message("block-dirty-bitmap-disable", **bitmap), False),
        (message("block-dirty-bitmap-enable", **bitmap), False),
        (message("block-dirty-bitmap-clear", node="d", name="nope"), True),
        (message("block-dirty-bitmap-add", node="d", name="c", persistent=True, disabled=True),
         False),
        (message("block-dirty-bitmap-merge", node="d", target="c", bitmaps=["b"]), False),
        (message("block-dirty-bitmap-remove", **bitmap), False),
        (message("blockdev-snapshot-internal-sync", **snapshot), False),
        (message("blockdev-snapshot-internal-sync", **snapshot), True),
        (message("blockdev-snapshot-internal-sync", device="d", name=""), True),
        (message("blockdev-snapshot-delete-internal-sync", device="d"), True),
        (message("blockdev-snapshot-delete-internal-sync", device="d", name="nope"), False),
        (message("blockdev-snapshot-delete-internal-sync", device="d", name="s"), False),
        (message("block-export-del", id="e"), False), (message("block-export-del", id="e"), True),
        (message("nbd-server-stop"), False), (message("blockdev-del", node_name="d"), False),
    )


@unittest.skipUnless(have("qemu-storage-daemon"), "qemu-storage-daemon is not installed")
class Peers(Scene):
    def setUp(self):
        super().setUp()
        for name in ("ours", "theirs"):
            self.create(name, 8 * MIB, "-f", "qcow2")
        self.peer = subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", "socket,path=q.qmp,server=on,wait=off,id=c",
             "--monitor", "chardev=c"], cwd=self.dir)
        self.addCleanup(self.peer.wait)
        self.addCleanup(self.peer.kill)
        wait_until(lambda: os.path.exists(self.path("q.qmp")), 20, "qemu-storage-daemon")
        self.daemon("serve", "--qmp", "unix:m.qmp")

    def both(self):
        clients = [Qmp(self.path(name), negotiate=False) for name in ("m.qmp", "q.qmp")]
        for client in clients:
            self.addCleanup(client.close)
            client.socket.settimeout(30)
        return clients

    def compare(self, client, peer, text, with_desc):
        answers = []
        for each, one in ((client, text), (peer, text)):
            each.send(one if isinstance(one, str) else json.dumps(one))
            answers.append(each.answer())
        ours, theirs = answers
        self.assertEqual("return" in ours, "return" in theirs, f"{text}: {ours} {theirs}")
        self.assertEqual(ours.get("id"), theirs.get("id"), text)
        if "error" in theirs:
            self.assertEqual(ours["error"]["class"], theirs["error"]["class"], text)
            if with_desc:
                self.assertEqual(ours["error"]["desc"], theirs["error"]["desc"], text)
        return ours, theirs

    def test_the_protocol(self):
        client, peer = self.both()
        self.assertEqual(set(client.greeting["QMP"]), set(peer.greeting["QMP"]))
        for text, with_desc in PROTOCOL:
            with self.subTest(text=text):
                self.compare(client, peer, text, with_desc)

    def test_the_life_of_a_disk(self):
        client, peer = self.both()
        self.compare(client, peer, '{"execute": "qmp_capabilities"}', False)
        for each, image in ((client, "ours"), (peer, "theirs")):
            node = {**NODE, "file": {"driver": "file", "filename": image}}
            self.assertEqual(each.command("blockdev-add", **node), {})
        ours = disk_commands(self.path("ours.sock"))
        theirs = disk_commands(self.path("theirs.sock"))
        for (one, with_desc), (other, _) in zip(ours, theirs):
            with self.subTest(command=one):
                if one["execute"] != "nbd-server-start":
                    other = one
                client.send(json.dumps(one))
                peer.send(json.dumps(other))
                mine, his = client.answer(), peer.answer()
                self.assertEqual("return" in mine, "return" in his, f"{mine} {his}")
                if "error" in his:
                    self.assertEqual(mine["error"]["class"], his["error"]["class"])
                    if with_desc:
                        self.assertEqual(mine["error"]["desc"], his["error"]["desc"])
                elif isinstance(his["return"], dict):
                    self.assertLessEqual(set(his["return"]), set(mine["return"]))
        events = [e["event"] for e in client.events]
        self.assertEqual(events, [e["event"] for e in peer.events])
        for image in ("ours", "theirs"):
            self.check(image)

    def test_our_client_and_their_server(self):
        def control(*arguments):
            done = subprocess.run([minivmm(), "control", "q.qmp", *arguments], cwd=self.dir,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                                  check=False)
            return done.returncode, done.stdout.decode()
        self.assertEqual(control("blockdev-add", "driver=qcow2", "node-name=d", "file.driver=file",
                                 "file.filename=theirs"), (0, "{}\n"))
        self.assertEqual(control("block_resize", "node-name=d", "size=32M")[0], 0)
        status, text = control("query-named-block-nodes")
        self.assertEqual(status, 0)
        self.assertIn(32 * MIB, [n["image"]["virtual-size"] for n in json.loads(text)])
        self.assertEqual(control("nope")[0], 1)
        self.assertEqual(control("quit")[0], 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
