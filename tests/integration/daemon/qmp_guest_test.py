#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The guest's life by the control socket, the events that it sends, and the client that comes along."""

import json
import os
import signal
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.qmp import ControlScene
from harness.nbd import NbdClient
from harness.scene import MIB, wait_until

QMP = ("--qmp", "unix:c.sock")
UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")


class GuestScene(ControlScene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")

    def start(self, *arguments, disk="disk,id=disk0", probe=("--probe",)):
        self.running = self.boot(*probe, "--disk", disk, *QMP, *arguments)
        self.connect()

    def status(self):
        return self.qmp.command("query-status")["status"]


class Guest(GuestScene):
    def test_stop_and_cont(self):
        self.start()
        self.running.job("write length=4096 pattern=7")
        self.qmp.command("stop")
        self.assertEqual(self.qmp.event("STOP"), {})
        self.assertEqual(self.status(), "paused")
        disk, = self.qmp.command("query-block")
        self.assertEqual((disk["device"], disk["inserted"]["users"]),
                         ("disk0", ["guest disk 'disk0'"]))
        self.qmp.command("stop")  # again: nothing happens
        begun = self.running.begin_job("verify length=4096 pattern=7")
        with self.assertRaises(TimeoutError):
            self.running.job_result(begun, 0.5)
        self.qmp.command("cont")
        self.assertEqual(self.qmp.event("RESUME"), {})
        self.assertTrue(self.running.job_result(begun)[0])
        self.assertEqual(self.status(), "running")
        self.assertEqual([e["event"] for e in self.qmp.events], [])

    def test_a_disk_that_fails_and_is_put_right(self):
        self.start(disk="driver=fault,node-name=disk0,op=write,errno=ENOSPC,count=2,"
                        "file.driver=qcow2,file.file.driver=file,file.file.filename=disk,"
                        "werror=stop")
        begun = self.running.begin_job("write length=4096")
        for _ in range(2):
            failed = self.qmp.event("BLOCK_IO_ERROR")
            self.assertEqual((failed["device"], failed["operation"], failed["action"],
                              failed["nospace"]), ("disk0", "write", "stop", True))
            self.qmp.event("STOP")
            self.assertEqual(self.status(), "io-error")
            self.qmp.command("cont")
            self.qmp.event("RESUME")
        self.assertTrue(self.running.job_result(begun)[0])
        self.assertEqual(self.status(), "running")

    def test_errors_that_the_guest_gets_are_told_of(self):
        self.start(disk="driver=fault,node-name=disk0,op=read,errno=EIO,count=1,file.driver=qcow2,"
                        "file.file.driver=file,file.file.filename=disk")
        self.running.failed_job("read length=4096")
        failed = self.qmp.event("BLOCK_IO_ERROR")
        self.assertEqual((failed["operation"], failed["action"], failed["nospace"]),
                         ("read", "report", False))
        self.assertEqual(self.status(), "running")

    def test_reset(self):
        self.start(*UNIX, "--export", "disk0,writable")
        client = self.nbd()
        client.write(0, b"n" * 512)
        for paused in (False, True):
            if paused:
                self.qmp.command("stop")
            at = self.running.output.count()
            self.qmp.command("system_reset")
            self.assertEqual(self.qmp.event("RESET"),
                             {"guest": False, "reason": "host-qmp-system-reset"})
            # What was held comes back held.
            self.assertEqual(self.status(), "paused" if paused else "running")
            if paused:
                self.qmp.command("cont")
            self.running.output.wait(lambda l: l.startswith("probe: shell"), at)
            self.running.job("verify length=512 pattern=0x6e")
            self.assertEqual(client.read(0, 512), b"n" * 512)
        client.close()

    def test_ends(self):
        for how, reason in (("exit 3", {"guest": True, "reason": "guest-shutdown"}),
                            ("reboot", {"guest": True, "reason": "guest-reset"}),
                            (None, {"guest": False, "reason": "host-qmp-quit"})):
            self.start()
            if how is None:
                self.qmp.command("quit")
            else:
                self.running.type(how)
            self.assertEqual(self.qmp.event("SHUTDOWN"), reason)
            self.assertIsNone(self.qmp.receive())
            self.assert_ended(self.running, 3 if how == "exit 3" else 0)

    def test_a_disk_that_is_used_stays(self):
        self.start()
        self.refuses("guest disk 'disk0'", "blockdev-del", node_name="disk0")


class Corruption(GuestScene):
    def test_it_is_told_of(self):
        """The entry of a written cluster says that its data lie in the middle of nowhere."""
        self.running = self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, "--export",
                                   "disk0,writable")
        client = NbdClient(self.path("m.sock"))
        client.write(0, b"x" * 65536)
        client.close()
        self.assert_ended(self.running, 0, signal.SIGTERM)
        with open(self.path("disk"), "r+b") as f:
            f.seek(40)
            l1, = struct.unpack(">Q", f.read(8))
            f.seek(l1)
            l2 = struct.unpack(">Q", f.read(8))[0] & 0x00fffffffffffe00
            f.seek(l2)
            f.write(struct.pack(">Q", 1 << 63 | 0x12345 << 9))
        self.running = self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *QMP, "--export",
                                   "disk0,writable")
        self.connect()
        client = NbdClient(self.path("m.sock"))
        with self.assertRaises(OSError):
            client.read(0, 512)
        told = self.qmp.event("BLOCK_IMAGE_CORRUPTED")
        self.assertEqual((told["node-name"], told["fatal"]), ("disk0", True))
        self.assertIn("0x", told["msg"])
        with self.assertRaises(OSError):
            client.write(0, b"y" * 512)
        client.close()


class Client(GuestScene):
    """minivmm control."""

    def control(self, *arguments, status=0, **more):
        done = subprocess.run([minivmm(), "control", *arguments], cwd=self.dir, timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, **more)
        self.assertEqual(done.returncode, status, done.stderr.decode())
        return done.stdout.decode() if status == 0 else done.stderr.decode()

    def setUp(self):
        super().setUp()
        self.running = self.daemon("serve", "--disk", "disk,id=disk0", *QMP)

    def test_commands(self):
        self.assertEqual(json.loads(self.control("c.sock", "query-block-exports")), [])
        self.control("c.sock", "nbd-server-start", "addr.type=unix", "addr.path=m.sock")
        self.control("unix:c.sock", "block-export-add", "type=nbd", "id=e1", "node-name=disk0",
                     "writable=on")
        self.assertEqual(self.control("--compact", "c.sock", "block_resize", "node-name=disk0",
                                      "size=16M"), "{}\n")
        client = NbdClient(self.path("m.sock"))
        self.assertEqual(client.size, 16 * MIB)
        self.assertIn("still in use", self.control("c.sock", "block-export-del", "id=e1", status=1))
        client.close()
        self.control("c.sock", "block-export-del", '{"id": "e1", "mode": "hard"}')
        self.assertEqual(json.loads(self.control("c.sock", '{"execute": "query-block-exports"}')),
                         [])
        self.assertIn("key=value", self.control("c.sock", "quit", "now", status=1))
        self.assertIn("has not been found", self.control("c.sock", "nope", status=1))
        self.control("c.sock", "quit")
        self.assert_ended(self.running, 0)
        self.assertIn("nobody can be reached", self.control("c.sock", "quit", status=2))

    def test_lines(self):
        text = self.control("--compact", "c.sock",
                            input=b"# comment\n\nblock_resize node-name='disk0' size=9M\n"
                                  b'{"execute": "query-block-exports"}\n')
        self.assertEqual(text, "{}\n[]\n")
        done = self.control("c.sock", status=1, input=b"nope\nblock_resize 'x\nquery-version\n")
        self.assertIn("nope", done)
        self.assertIn("not closed", done)

    def test_events(self):
        process = subprocess.Popen([minivmm(), "control", "c.sock", "--events", "SHUTDOWN"],
                                   cwd=self.dir, stdout=subprocess.PIPE)
        self.addCleanup(process.stdout.close)

        # It has negotiated once it waits for more.
        wait_until(lambda: self.sleeps_in_poll(process.pid), 10, "the client")
        self.assert_ended(self.running, 0, signal.SIGTERM)
        event = json.loads(process.stdout.readline())
        self.assertEqual(event["data"]["reason"], "host-signal")
        self.assertEqual(process.wait(10), 0)

    def sleeps_in_poll(self, pid):
        """A second time in a row: the first one may wait for the greeting."""
        self.control("c.sock", "query-version")
        with open(f"/proc/{pid}/wchan", encoding="ascii") as f:
            return "poll" in f.read()

    def test_help_teaches(self):
        text = self.control("--help")
        self.assertIn("block_resize [device=TEXT] [node-name=TEXT] size=NUMBER", text)
        self.assertIn("socket is expected", self.control(status=1))


if __name__ == "__main__":
    unittest.main(verbosity=2)
