#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The control socket: its protocol, and that nobody who may open it can do harm by what he sends."""

import json
import os
import signal
import socket
import stat
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.qmp import Qmp, QmpError
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, wait_until

QMP = ("--qmp", "unix:c.sock")
DISK = ("--disk", "disk,id=disk0")
UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")


class QmpScene(Scene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")

    def serve(self, *arguments):
        return self.daemon("serve", *DISK, *QMP, *arguments)

    def qmp(self, **more):
        client = Qmp(self.path("c.sock"), **more)
        self.addCleanup(client.close)
        return client

    def refuses(self, client, name, /, **arguments):
        with self.assertRaises(QmpError) as caught:
            client.command(name, **arguments)
        return caught.exception


class Protocol(QmpScene):
    def test_a_conversation(self):
        self.serve()
        client = self.qmp(negotiate=False)
        self.assertEqual(client.greeting["QMP"]["capabilities"], [])
        self.assertIn("minivmm", client.greeting["QMP"]["version"]["package"])
        error = self.refuses(client, "query-version")
        self.assertEqual(error.error_class, "CommandNotFound")
        self.assertIn("qmp_capabilities", error.desc)
        self.assertEqual(client.command("qmp_capabilities"), {})
        self.assertEqual(self.refuses(client, "qmp_capabilities").error_class, "CommandNotFound")
        names = {each["name"] for each in client.command("query-commands")}
        self.assertLessEqual({"qmp_capabilities", "query-version", "quit"}, names)
        error = self.refuses(client, "no-such-command")
        self.assertEqual((error.error_class, error.desc),
                         ("CommandNotFound", "The command no-such-command has not been found"))
        # An id comes back as it is, also with errors; several messages may come at once.
        client.send('{"execute":"query-version","id":{"a":[1,null]}} {"execute":"nope","id":7}'
                    '{"id":"x","execute":\n"query-status"}')
        self.assertEqual(client.answer()["id"], {"a": [1, None]})
        self.assertEqual(client.answer()["id"], 7)
        last = client.answer()
        self.assertEqual(last["id"], "x")
        self.assertIn("There is no guest", last["error"]["desc"])

    def test_the_socket_is_private_and_goes_with_us(self):
        daemon = self.serve()
        self.assertEqual(stat.S_IMODE(os.stat(self.path("c.sock")).st_mode), 0o600)
        client = self.qmp()
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.assertEqual(client.event("SHUTDOWN"), {"guest": False, "reason": "host-signal"})
        self.assertIsNone(client.receive())
        self.assertFalse(os.path.exists(self.path("c.sock")))

    def test_only_unix_sockets(self):
        for where in ("tcp:127.0.0.1:4444", "c.sock", "unix:", "unix:c.sock,server=off"):
            self.assertIn("unix:PATH", self.refused("serve", *DISK, "--qmp", where))
        self.daemon("serve", *DISK, "--qmp", "unix:c.sock,server=on,wait=off")
        self.qmp()

    def test_quit(self):
        daemon = self.serve()
        client = self.qmp()
        other = self.qmp()
        self.assertEqual(client.command("quit"), {})
        for each in (client, other):
            self.assertEqual(each.event("SHUTDOWN")["reason"], "host-qmp-quit")
            self.assertIsNone(each.receive())
        self.assert_ended(daemon, 0)

    def test_an_end_while_a_command_hangs(self):
        """It is waited for twice: before anything is taken down, and before the graph is closed. So
        one that ends in between costs nobody anything."""
        mute = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.addCleanup(mute.close)
        mute.bind(self.path("mute.sock"))
        mute.listen()
        running = self.serve(*UNIX, "--export", "disk0,writable", "--shutdown-timeout", "2")
        nbd = NbdClient(self.path("m.sock"))
        nbd.write(0, b"x" * 4096)
        client = self.qmp()
        client.begin("blockdev-add", driver="nbd", node_name="far",
                     server={"type": "unix", "path": "mute.sock"})
        peer, _ = mute.accept()
        running.send(signal.SIGTERM)
        time.sleep(1.3)  # more than half of the time that an end may take
        peer.close()
        self.assertIn("error", client.answer())
        self.assert_ended(running, 0)
        nbd.close()
        self.check("disk")

    def test_arguments_are_checked(self):
        self.serve()
        client = self.qmp()
        for arguments, text in (({"flat": "yes"}, "Invalid parameter type for 'flat'"),
                                ({"deep": True}, "Parameter 'deep' is unexpected"),
                                ({"node_name": "nope"}, "no node 'nope'; there are: disk0")):
            self.assertIn(text, self.refuses(client, "query-named-block-nodes", **arguments).desc)

    def test_the_live_state(self):
        self.serve(*UNIX, "--export", "disk0,writable,name=d")
        nbd = NbdClient(self.path("m.sock"), "d")
        nbd.write(0, b"x" * 512)
        client = self.qmp()
        disk, = client.command("query-named-block-nodes", node_name="disk0")
        self.assertEqual((disk["drv"], disk["ro"], disk["image"]["virtual-size"]),
                         ("qcow2", False, 8 * MIB))
        self.assertEqual(disk["users"], ["NBD export 'd'"])
        self.assertIn("L2", disk["state"])
        self.assertEqual([n["node-name"] for n in client.command("query-named-block-nodes")],
                         ["disk0.file", "disk0"])
        export, = client.command("query-block-exports")
        self.assertEqual((export["id"], export["type"], export["node-name"], export["writable"]),
                         ("d.nbd", "nbd", "disk0", True))
        self.assertIn("d?socket=", client.command("query-nbd-server")["uris"][0])
        self.assertTrue(any("NBD client" in l for l in client.command("query-state")["lines"]))
        nbd.close()


class Hostile(QmpScene):
    """Whatever comes in: an answer, or the end of that connection, and nobody else notices."""

    def setUp(self):
        super().setUp()
        self.running = self.serve(*UNIX, "--export", "disk0")
        self.client = self.qmp()

    def tearDown(self):
        wait_until(self.served, 10, "a place for a client")
        self.assert_ended(self.running, 0, signal.SIGTERM)

    def served(self):
        try:
            with Qmp(self.path("c.sock")) as client:
                return "qemu" in client.command("query-version")
        except (OSError, TypeError, KeyError):  # refused: there are many, still
            return False

    def error(self, data):
        self.client.send(data)
        return self.client.answer()["error"]["desc"]

    def works(self):
        self.assertIn("qemu", self.client.command("query-version"))

    def test_what_is_no_json(self):
        for data in ("hello\n", "}\n", '{"execute": }', "{]", '{"a" "b"}', '["execute"}',
                     b'{"execute": "query-version\xff', '{"execute": "a\nb"}\n', "nul\n",
                     b'{"execute": "\x80"}', '{"x":1,}'):
            self.assertEqual(self.error(data), "Invalid JSON syntax", data)
            self.client.send(b"\xff")
            self.client.send('{"execute": "query-version", "id": "sync"}\n')
            while self.client.answer().get("id") != "sync":
                pass  # what was behind the error on its line may be wrong, too

    def test_what_is_no_command(self):
        for data, text in (("[]", "QMP input must be a JSON object"),
                           ("{}", "QMP input lacks member 'execute'"),
                           ('{"execute": 5}', "QMP input member 'execute' must be a string"),
                           ('{"execute": "quit", "arguments": 1}',
                            "QMP input member 'arguments' must be an object"),
                           ('{"execute": "quit", "more": 1}', "QMP input member 'more' is unexpected"),
                           ('{"exec-oob": "quit"}', "QMP input member 'exec-oob' is unexpected")):
            self.assertEqual(self.error(data), text)
            self.works()

    def test_too_deep(self):
        for depth in (64, 65, 5000, 100_000):
            said = self.error('{"execute": "query-version", "id": ' + "[" * depth + "]" * depth + "}")
            self.assertRegex(said, "nested|has .* bytes")
            self.works()
        self.client.send('{"execute": "query-version", "id": ' + "[" * 63 + "]" * 63 + "}")
        self.assertIn("return", self.client.answer())

    def test_too_large(self):
        big = "x" * (8 * MIB)
        self.assertIn("at most", self.error('{"execute": "' + big + '"}'))
        self.works()
        before = self.memory()
        for _ in range(8):  # never ends, and nothing of it is kept
            self.client.send('{"execute": "' + big if _ == 0 else big)
        self.assertLess(self.memory() - before, 32 * MIB)
        self.client.send(b"\xff")
        self.assertEqual(self.client.answer()["error"]["desc"], "Invalid JSON syntax")
        self.works()

    def memory(self):
        with open(f"/proc/{self.running.pid}/status", encoding="utf-8") as f:
            line = next(l for l in f if l.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def test_a_client_that_reads_nothing(self):
        """It may send as much as it likes: we stop reading, and hold nothing."""
        self.client.socket.setblocking(False)
        before = self.memory()
        sent = 0
        try:
            while sent < 64 * MIB:
                sent += self.client.socket.send(b'{"execute":"query-named-block-nodes"}' * 200)
                if sent % (1 * MIB) < 8192:
                    other = Qmp(self.path("c.sock"))
                    other.close()
        except BlockingIOError:
            pass
        self.assertLess(sent, 64 * MIB)
        self.assertLess(self.memory() - before, 32 * MIB)
        self.client.close()

    def test_half_a_conversation(self):
        for data in (b"", b"{", b'{"execute": "query-version"}', b'{"execute": "query-'):
            for how in (socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR, None):
                one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                one.connect(self.path("c.sock"))
                one.sendall(data)
                if how is not None:
                    one.shutdown(how)
                one.close()
        self.works()

    def test_answers_come_also_when_no_more_will_be_asked(self):
        self.client.send('{"execute": "query-version"}{"execute": "query-commands"}')
        self.client.socket.shutdown(socket.SHUT_WR)
        self.assertIn("qemu", self.client.answer()["return"])
        self.assertIsInstance(self.client.answer()["return"], list)
        self.assertIsNone(self.client.receive())

    def test_too_many_clients(self):
        others = [Qmp(self.path("c.sock")) for _ in range(15)]
        more = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        more.settimeout(20)
        more.connect(self.path("c.sock"))
        self.assertIn("16 clients", json.loads(more.makefile().readline())["error"]["desc"])
        self.assertEqual(more.recv(1), b"")
        more.close()
        for each in others:
            each.command("query-version")
            each.close()
        wait_until(self.served, 10, "a place for a client")


if __name__ == "__main__":
    unittest.main(verbosity=2)
