#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A disk's size, bitmaps and snapshots change by the control socket while everybody uses it."""

import json
import os
import re
import signal
import sys
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL
from harness.qmp import ControlScene
from harness.nbd import NbdClient
from harness.scene import MIB, have, run, wait_until

UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")
EXPORT = ("--export", "disk0,writable")


class DiskScene(ControlScene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")

    def start(self, *arguments, command="serve"):
        self.running = self.daemon(command, "--disk", "disk,id=disk0", "--qmp", "unix:c.sock",
                                   *UNIX, *arguments)
        self.connect()

    def info(self):
        return json.loads(self.tool("info", "--output=json", self.path("disk")))

    def ended(self):
        self.assert_ended(self.running, 0, signal.SIGTERM)
        self.check("disk")


class Resize(DiskScene):
    def test_every_front_end_sees_it(self):
        self.start("--fuse", "mnt", *EXPORT, "--memory", "64M", "--append", SHELL, command="boot")
        self.running.wait_shell()
        before = self.nbd()
        before.write(8 * MIB - 4096, b"e" * 4096)
        for size in (24 * MIB, 16 * MIB, 64 * MIB):
            self.qmp.command("block_resize", node_name="disk0", size=size)
            self.assertEqual(os.stat(self.path("mnt/disk0")).st_size, size)
            after = NbdClient(self.path("m.sock"))
            self.assertEqual(after.size, size)
            after.write(size - 4096, b"n" * 4096)
            after.close()
            # A client that was there can use what has come.
            self.assertEqual(before.read(size - 4096, 4096), b"n" * 4096)
            wait_until(lambda: self.guest_size() == size, 10, f"the guest's {size}")
            self.assertEqual(self.running.job(f"read offset={size - 4096} length=4096")["bytes"],
                             "4096")
        # What lies behind a nearer end is gone, and does not come back.
        self.assertEqual(before.read(24 * MIB - 4096, 4096), bytes(4096))
        self.assertEqual(before.read(8 * MIB - 4096, 4096), b"e" * 4096)
        disk, = self.qmp.command("query-named-block-nodes", node_name="disk0")
        self.assertEqual(disk["image"]["virtual-size"], 64 * MIB)
        self.ended()

    def guest_size(self):
        start = self.running.output.count()
        self.running.job("info")
        lines = self.running.output.lines[start:]
        return int(re.search(r"disk=0 capacity=(\d+)", "\n".join(lines)).group(1))

    def test_while_clients_write(self):
        self.start("--fuse", "mnt", *EXPORT)
        stop = threading.Event()
        problems = []

        def write(number):
            try:
                client = NbdClient(self.path("m.sock"))
                at = 0
                while not stop.is_set():
                    client.write(number * MIB + at % MIB, bytes([number]) * 4096)
                    at += 4096
                client.flush()
                client.close()
            except Exception as e:  # pylint: disable=broad-except
                problems.append(e)
        threads = [threading.Thread(target=write, args=(n,)) for n in range(1, 5)]
        for thread in threads:
            thread.start()
        for round in range(30):
            self.qmp.command("block_resize", device="disk0", size=(8 + (round * 7) % 40) * MIB)
        stop.set()
        for thread in threads:
            thread.join()
        self.assertEqual(problems, [])
        self.ended()
        self.assertEqual(self.info()["virtual-size"], (8 + (29 * 7) % 40) * MIB)

    def test_it_is_there_after_a_crash(self):
        self.start(*EXPORT)
        self.qmp.command("block_resize", node_name="disk0", size=100 * MIB)
        self.running.kill()
        self.assertEqual(self.info()["virtual-size"], 100 * MIB)
        self.check("disk", leaks_allowed=True)

    def test_what_cannot_be_resized(self):
        self.create("base", MIB, "-f", "raw")
        self.create("other", MIB, "-f", "raw")
        self.overlay("top", "base", MIB)
        self.start("--blockdev", "driver=raw,node-name=base,file.driver=file,file.filename=base",
                   "--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top,"
                   "backing=base", "--disk", "other,format=raw,ro,id=ro", *EXPORT)
        for text, arguments in (
                ("does not allow", {"node_name": "base", "size": 2 * MIB}),
                ("does not allow", {"node_name": "disk0.file", "size": 2 * MIB}),
                ("read-only", {"node_name": "ro", "size": 2 * MIB}),
                ("no node 'nope'", {"node_name": "nope", "size": MIB}),
                ("512", {"node_name": "disk0", "size": MIB + 1}),
                ("'size' is expected", {"node_name": "disk0", "size": -1}),
                ("'size' is expected", {"node_name": "disk0", "size": 2**63}),
                ("One of", {"size": MIB}), ("One of", {"node_name": "a", "device": "a", "size": 1}),
                ("'size' is missing", {"node_name": "disk0"})):
            self.refuses(text, "block_resize", **arguments)
        self.assertEqual(self.nbd().size, 8 * MIB)
        self.ended()


class Bitmaps(DiskScene):
    def bitmaps(self):
        disk, = self.qmp.command("query-named-block-nodes", node_name="disk0")
        return {b["name"]: b for b in disk["dirty-bitmaps"]}

    def stored(self):
        found = self.info()["format-specific"]["data"].get("bitmaps", [])
        return {b["name"]: set(b["flags"]) for b in found}

    def change(self, what, name, **more):
        self.qmp.command(f"block-dirty-bitmap-{what}", node="disk0", name=name, **more)

    def dirty(self, name):
        """The ranges that NBD clients see, as (offset, length)."""
        status, text = run(["nbdinfo", f"--map=qemu:dirty-bitmap:{name}",
                            f"nbd+unix:///disk0?socket={self.path('m.sock')}"])
        self.assertEqual(status, 0, text)
        rows = [line.split() for line in text.splitlines()]
        return [(int(r[0]), int(r[1])) for r in rows if r[2] == "1"]

    @unittest.skipUnless(have("nbdinfo"), "libnbd-bin is not installed")
    def test_a_life_while_the_disk_is_used(self):
        self.start(*EXPORT)
        client = self.nbd()
        client.write(0, b"0" * 4096)
        self.change("add", "b", persistent=True, granularity=65536)
        self.assertEqual(self.dirty("b"), [])
        client.write(MIB, b"1" * 4096)
        self.assertEqual(self.dirty("b"), [(MIB, 65536)])
        self.change("disable", "b")
        client.write(2 * MIB, b"2" * 4096)
        self.assertFalse(self.bitmaps()["b"]["recording"])
        self.assertEqual(self.bitmaps()["b"]["count"], 65536)
        self.change("add", "c", persistent=True, granularity=65536)
        self.change("enable", "b")
        client.write(3 * MIB, b"3" * 4096)
        self.assertEqual(self.dirty("b"), [(MIB, 65536), (3 * MIB, 65536)])
        self.assertEqual(self.dirty("c"), [(3 * MIB, 65536)])
        self.change("clear", "b")
        self.assertEqual(self.dirty("b"), [])
        self.qmp.command("block-dirty-bitmap-merge", node="disk0", target="b",
                         bitmaps=["c", {"node": "disk0", "name": "c"}])
        self.assertEqual(self.dirty("b"), [(3 * MIB, 65536)])
        self.change("remove", "c")
        self.change("add", "d", persistent=True, disabled=True)
        self.assertEqual(set(self.bitmaps()), {"b", "d"})
        self.ended()
        self.assertEqual(self.stored(), {"b": {"auto"}, "d": set()})
        # And it goes on.
        self.start(*EXPORT)
        self.assertEqual({n: b["count"] for n, b in self.bitmaps().items()}, {"b": 65536, "d": 0})
        self.assertEqual(self.dirty("b"), [(3 * MIB, 65536)])
        self.nbd().write(5 * MIB, b"5" * 4096)
        self.assertEqual(self.dirty("b"), [(3 * MIB, 65536), (5 * MIB, 65536)])
        self.ended()

    def test_after_a_crash_nothing_that_missed_changes_looks_whole(self):
        """Each is on disk already. What was done to it while the disk was in use is lost with the
        process, so none of them may be taken for true; one that was not touched is."""
        self.tool("bitmap", "--add", self.path("disk"), "enabled")
        for name in ("turned-on", "merged", "removed", "untouched"):
            self.tool("bitmap", "--add", "--disable", self.path("disk"), name)
        self.start(*EXPORT)
        self.change("enable", "turned-on")
        self.change("remove", "removed")
        self.qmp.command("block-dirty-bitmap-merge", node="disk0", target="merged",
                         bitmaps=["enabled"])
        self.nbd().write(0, b"x" * 4096, fua=True)
        self.running.kill()
        flags = self.stored()
        for name in ("enabled", "turned-on", "merged", "removed"):
            self.assertIn("in-use", flags[name], name)
        self.assertEqual(flags["untouched"], set())
        # Such can be removed and nothing else.
        self.start(*EXPORT)
        self.assertTrue(self.bitmaps()["merged"]["inconsistent"])
        self.refuses("inconsistent", "block-dirty-bitmap-clear", node="disk0", name="merged")
        for name in ("enabled", "turned-on", "merged", "removed"):
            self.change("remove", name)
        self.ended()
        self.assertEqual(self.stored(), {"untouched": set()})

    def test_what_is_refused(self):
        self.create("small", MIB, "-f", "qcow2")
        self.create("plain", MIB, "-f", "raw")
        self.start("--disk", "small,id=small", "--disk", "plain,format=raw,id=plain", *EXPORT)
        self.change("add", "b", persistent=True)
        self.qmp.command("block-dirty-bitmap-add", node="small", name="s", persistent=True)
        for text, name, arguments in (
                ("'persistent' is expected", "add", {"name": "x"}),
                ("already exists", "add", {"name": "b", "persistent": True}),
                ("ranularity", "add", {"name": "x", "persistent": True, "granularity": 1000}),
                ("not found", "remove", {"name": "x"}), ("not found", "clear", {"name": "x"}),
                ("not found", "enable", {"name": "x"}),
                ("keeps no dirty bitmaps", "add", {"node": "plain", "name": "x",
                                                   "persistent": True}),
                ("not found", "merge", {"target": "b", "bitmaps": ["x"]}),
                ("not found", "merge", {"target": "x", "bitmaps": ["b"]}),
                ("smaller disk", "merge", {"target": "b",
                                           "bitmaps": [{"node": "small", "name": "s"}]}),
                ("'name' is missing", "merge", {"target": "b", "bitmaps": [{"node": "small"}]}),
                ("is missing", "merge", {"target": "b", "bitmaps": [5]})):
            self.refuses(text, f"block-dirty-bitmap-{name}", **{"node": "disk0", **arguments})
        self.ended()


class Snapshots(DiskScene):
    def snapshots(self):
        disk, = self.qmp.command("query-named-block-nodes", node_name="disk0")
        return [s["name"] for s in disk["image"].get("snapshots", [])]

    def take(self, name):
        self.qmp.command("blockdev-snapshot-internal-sync", device="disk0", name=name)

    def delete(self, **which):
        return self.qmp.command("blockdev-snapshot-delete-internal-sync", device="disk0", **which)

    def content(self, name):
        """What a snapshot holds, by way of our own tool."""
        self.tool("convert", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}",
                  self.path("disk"), self.path("out"))
        with open(self.path("out"), "rb") as f:
            return f.read()

    def test_it_holds_what_was_there(self):
        self.start(*EXPORT)
        client = self.nbd()
        client.write(0, b"1" * 65536)
        self.take("one")
        client.write(0, b"2" * 4096)
        client.zero(MIB, MIB)
        self.take("two")
        client.write(8192, b"3" * 4096)
        self.assertEqual(self.snapshots(), ["one", "two"])
        self.refuses("already exists", "blockdev-snapshot-internal-sync", device="disk0", name="one")
        self.refuses("empty", "blockdev-snapshot-internal-sync", device="disk0", name="")
        self.assertEqual(client.read(0, 16384), b"2" * 4096 + b"1" * 4096 + b"3" * 4096 + b"1" * 4096)
        self.ended()
        self.assertEqual(self.content("one")[:65536], b"1" * 65536)
        self.assertEqual(self.content("two")[:12288], b"2" * 4096 + b"1" * 8192)
        self.start(*EXPORT)
        self.refuses("does not exist", "blockdev-snapshot-delete-internal-sync", device="disk0",
                     id="2", name="one")
        self.refuses("must be provided", "blockdev-snapshot-delete-internal-sync", device="disk0")
        self.assertEqual(self.delete(id="2")["name"], "two")
        self.assertEqual(self.delete(id="1", name="one")["id"], "1")
        self.assertEqual(self.snapshots(), [])
        self.ended()

    def test_one_moment_while_clients_write(self):
        """Each client writes a growing number to its place, one after the other, and waits for each:
        a snapshot that has number n at a place has at least n - 1 at those before."""
        self.start(*EXPORT)
        places = 8
        stop = threading.Event()
        problems = []

        def write():
            try:
                client = NbdClient(self.path("m.sock"))
                number = 0
                while not stop.is_set():
                    number += 1
                    for place in range(places):
                        client.write(place * MIB + 512 * (number % 64), number.to_bytes(8, "big") * 64)
                        client.write(place * MIB + 65536, number.to_bytes(8, "big") * 64)
                client.close()
            except Exception as e:  # pylint: disable=broad-except
                problems.append(e)
        thread = threading.Thread(target=write)
        thread.start()
        for number in range(8):
            self.take(f"s{number}")
            if number % 3 == 2:
                self.delete(name=f"s{number - 1}")
        stop.set()
        thread.join()
        self.assertEqual(problems, [])
        names = self.snapshots()
        self.ended()
        for name in names:
            disk = self.content(name)
            seen = [int.from_bytes(disk[p * MIB + 65536:][:8], "big") for p in range(places)]
            self.assertEqual(seen, sorted(seen, reverse=True), name)
            self.assertLessEqual(seen[0] - seen[-1], 1, name)

    def test_it_is_there_after_a_crash(self):
        self.start(*EXPORT)
        client = self.nbd()
        client.write(0, b"a" * 65536, fua=True)
        self.take("kept")
        self.take("gone")
        self.delete(name="gone")
        client.write(0, b"b" * 65536, fua=True)
        self.running.kill()
        self.check("disk", leaks_allowed=True)
        self.assertEqual([s["name"] for s in self.info()["snapshots"]], ["kept"])
        self.assertEqual(self.content("kept")[:65536], b"a" * 65536)

    def test_what_has_none(self):
        self.create("plain", MIB, "-f", "raw")
        self.start("--disk", "plain,format=raw,id=plain", *EXPORT)
        self.refuses("does not support internal snapshots", "blockdev-snapshot-internal-sync",
                     device="plain", name="x")


if __name__ == "__main__":
    unittest.main(verbosity=2)
