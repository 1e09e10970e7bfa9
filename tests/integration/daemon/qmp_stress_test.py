#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Random commands by several control clients while NBD and FUSE write the same disk: what was
written is there, and the image is sound."""

import contextlib
import os
import random
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import NbdClient
from harness.qmp import Qmp, QmpError
from harness.scene import MIB, SLOW, Scene

KEPT = 8 * MIB  # no resize cuts off more than what is beyond
SLOT = 65536
NAMES = ("x0", "x1", "x2")
SECONDS = 60 if SLOW else 4


class Stress(Scene):
    def setUp(self):
        super().setUp()
        self.seed = self.random.randrange(1 << 31)
        self.done = {}
        self.failed = []
        self.lock = threading.Lock()

    # --- commands: (name, arguments), of which many cannot be carried out when they come ---

    @staticmethod
    def change(choice):
        name = choice.choice(NAMES)
        bitmap = {"node": "disk0", "name": name}
        return choice.choice((
            ("block_resize", {"node_name": "disk0", "size": KEPT + choice.randrange(999) * 65536}),
            ("block-dirty-bitmap-add", {**bitmap, "persistent": True}),
            ("block-dirty-bitmap-remove", bitmap),
            ("block-dirty-bitmap-clear", bitmap),
            ("block-dirty-bitmap-disable", bitmap),
            ("block-dirty-bitmap-merge",
             {"node": "disk0", "target": name, "bitmaps": [choice.choice(NAMES)]}),
            ("blockdev-snapshot-internal-sync", {"device": "disk0", "name": name}),
            ("blockdev-snapshot-delete-internal-sync", {"device": "disk0", "name": name}),
            ("block-export-add", {"type": "nbd", "id": name, "node_name": "disk0", "name": name,
                                  "writable": choice.random() < 0.5}),
            ("block-export-del", {"id": name, "mode": choice.choice(("safe", "hard"))}),
            ("blockdev-add", {"driver": "memory", "node_name": name, "size": MIB}),
            ("blockdev-del", {"node_name": name}),
            ("query-named-block-nodes", {}),
            ("query-block-exports", {}),
        ))

    def commander(self, number):
        choice = random.Random(self.seed * 100 + number)
        qmp = Qmp(self.path("c.sock"))
        while time.monotonic() < self.until:
            name, arguments = self.change(choice)
            try:
                qmp.command(name, **arguments)
                with self.lock:
                    self.done[name] = self.done.get(name, 0) + 1
            except QmpError as e:
                self.assertEqual(e.error_class, "GenericError", e)
            if choice.random() < 0.02:
                qmp.close()
                qmp = Qmp(self.path("c.sock"))
        qmp.close()

    # --- writers: each has every third slot to itself, and knows what is there ---

    def writer(self, number, write):
        choice = random.Random(self.seed * 1000 + number)
        while time.monotonic() < self.until:
            slot = choice.randrange(KEPT // SLOT // 3) * 3 + number
            data = choice.randbytes(4096) * (SLOT // 4096)
            write(slot * SLOT, data)
            self.model[slot] = data

    def by_nbd(self):
        client = NbdClient(self.path("m.sock"))
        self.addCleanup(client.close)
        return client.write

    def by_fuse(self):
        file = open(self.path("mnt/disk0"), "r+b", buffering=0)
        self.files.append(file)
        return lambda offset, data: os.pwrite(file.fileno(), data, offset)

    # Comes and goes by the exports that come and go; whatever it meets, others must not notice.
    def visitor(self):
        choice = random.Random(self.seed)
        while time.monotonic() < self.until:
            try:
                with contextlib.closing(
                        NbdClient(self.path("m.sock"), choice.choice(NAMES))) as client:
                    for _ in range(choice.randrange(50)):
                        client.read(choice.randrange(KEPT // 4096) * 4096, 4096)
            except (OSError, EOFError):
                pass

    def start(self, work, *arguments):
        def guarded():
            try:
                work(*arguments)
            except BaseException as e:  # pylint: disable=broad-except
                self.failed.append(e)
        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def test_random_commands_beside_writers(self):
        self.create("base", KEPT, "-f", "raw")
        self.overlay("disk", "base", KEPT)
        daemon = self.daemon("serve", "--disk", "disk,id=disk0", "--qmp", "unix:c.sock",
                             "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                             "--export", "disk0,writable")
        self.model = {}
        self.files = []
        self.until = time.monotonic() + SECONDS
        threads = [self.start(self.commander, i) for i in range(3)]
        threads += [self.start(self.writer, i, write) for i, write in
                    enumerate((self.by_nbd(), self.by_nbd(), self.by_fuse()))]
        threads.append(self.start(self.visitor))
        for thread in threads:
            thread.join(SECONDS + 60)
            self.assertFalse(thread.is_alive(), "a client waits for ever")
        self.assertEqual(self.failed, [])
        # Every kind of change was made, or this test shows less than it says.
        wanted = {"block_resize", "block-dirty-bitmap-merge", "blockdev-snapshot-internal-sync",
                  "blockdev-snapshot-delete-internal-sync", "block-export-del", "blockdev-del"}
        self.assertEqual(wanted - set(self.done), set())

        reader = NbdClient(self.path("m.sock"))
        for slot, data in self.model.items():
            self.assertEqual(reader.read(slot * SLOT, SLOT), data, f"slot {slot}")
        reader.close()
        for file in self.files:
            file.close()
        with Qmp(self.path("c.sock")) as qmp:
            qmp.command("quit")
        daemon.wait(30)
        self.check("disk")


if __name__ == "__main__":
    unittest.main()
