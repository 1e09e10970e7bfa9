#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What would corrupt an image, or take something from a daemon that runs, is refused, and the
message says who is in the way."""

import os
import signal
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, is_mounted, run, wait_until

UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")
DISK = ("--disk", "disk,id=disk0")
EXPORT = ("--export", "disk0,writable")


class ConflictScene(Scene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")

    def use(self):
        client = NbdClient(self.path("m.sock"))
        client.write(0, b"x" * 512)
        self.assertEqual(client.read(0, 512), b"x" * 512)
        client.close()


@unittest.skipUnless(have("qemu-io", "qemu-nbd", "qemu-img"), "qemu-utils is not installed")
class OtherPrograms(ConflictScene):
    def refused_by_both(self):
        for disk in (DISK, ("--disk", "disk,id=disk0,ro")):
            said = self.refused("serve", *disk, *UNIX, "--export", "disk0")
            self.assertIn("disk: is in use", said)
        self.assertFalse(os.path.exists(self.path("m.sock")))

    def test_qemu_io_has_it(self):
        holder = subprocess.Popen(["qemu-io", "-f", "qcow2", self.path("disk")],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(holder.stdout.close)
        holder.stdin.write(b"write -P 5 0 4096\nflush\n")
        holder.stdin.flush()
        self.assertIn(b"wrote", holder.stdout.readline() + holder.stdout.readline())
        self.refused_by_both()
        holder.communicate(b"quit\n", 30)
        # Not any more.
        self.daemon("serve", *DISK, *UNIX, *EXPORT)
        self.use()

    def test_qemu_nbd_has_it(self):
        holder = subprocess.Popen(["qemu-nbd", "-t", "-f", "qcow2", "-k", self.path("q.sock"),
                                   self.path("disk")])
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        wait_until(lambda: os.path.exists(self.path("q.sock")), 30, "qemu-nbd")
        self.refused_by_both()

    def test_we_have_it(self):
        self.daemon("serve", *DISK, *UNIX, *EXPORT)
        image = self.path("disk")
        for command in (["qemu-io", "-f", "qcow2", "-c", "write 0 512", image],
                        ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image],
                        ["qemu-nbd", "-f", "qcow2", "-k", self.path("q.sock"), image],
                        ["qemu-img", "resize", "-f", "qcow2", image, "32M"],
                        ["qemu-img", "snapshot", "-c", "s", image],
                        ["qemu-img", "check", "-r", "all", image]):
            status, text = run(command, 30)
            self.assertNotEqual(status, 0, text)
            self.assertIn("lock", text)
        self.use()

    def test_readers_share(self):
        self.daemon("serve", "--disk", "disk,id=disk0,ro", *UNIX, "--export", "disk0")
        status, text = run(["qemu-img", "info", self.path("disk")])
        self.assertEqual(status, 0, text)
        status, text = run(["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", self.path("disk")])
        self.assertEqual(status, 0, text)
        status, text = run(["qemu-io", "-f", "qcow2", "-c", "write 0 512", self.path("disk")])
        self.assertIn("lock", text)

    def test_the_base_of_an_overlay_that_we_serve(self):
        """The base must stay as it is while somebody reads through it."""
        self.create("base", 8 * MIB, "-f", "raw")
        self.overlay("over", "base", 8 * MIB)
        self.daemon("serve", "--disk", "over,id=disk0", *UNIX, *EXPORT)
        _, text = run(["qemu-io", "-f", "raw", "-c", "write 0 512", self.path("base")])
        self.assertIn("lock", text)
        said = self.refused("serve", "--disk", "base,format=raw,id=b", "--nbd",
                            "nbd+unix:///?socket=b.sock", "--export", "b,writable")
        self.assertIn("base: is in use", said)


class Ourselves(ConflictScene):
    def test_twice_on_one_image(self):
        self.daemon("serve", *DISK, *UNIX, *EXPORT)
        for command in (("serve", "--disk", "disk,id=d", "--nbd", "nbd+unix:///?socket=n.sock",
                         "--export", "d,writable"),
                        ("boot", "--disk", "disk,id=d", "--append", "job=info")):
            said = self.refused(*command)
            self.assertIn("disk: is in use", said)
        self.use()

    def test_two_overlays_on_one_base(self):
        self.create("base", 8 * MIB, "-f", "raw")
        for name in ("one", "two"):
            self.overlay(name, "base", 8 * MIB)
            self.daemon("serve", "--disk", f"{name},id=disk0", "--nbd",
                        f"nbd+unix:///?socket={name}.sock", *EXPORT)

    def test_one_image_under_two_names_in_one_process(self):
        os.symlink("disk", self.path("link"))
        os.link(self.path("disk"), self.path("hard"))
        for name in ("disk", "./disk", self.path("disk"), "link", "hard"):
            said = self.refused("serve", *DISK, "--disk", f"{name},format=qcow2,id=other", *UNIX,
                                *EXPORT, "--export", "other,writable")
            self.assertIn(f"{name}: is", said)
            self.assertIn("disk", said)
            self.assertIn("already open for writing by node", said)

    def test_a_live_socket_is_not_taken(self):
        self.daemon("serve", *DISK, *UNIX, *EXPORT)
        self.create("disk2", MIB, "-f", "qcow2")
        said = self.refused("serve", "--disk", "disk2,id=d", *UNIX, "--export", "d")
        self.assertIn("m.sock", said)
        self.use()

    def test_a_live_mount_is_not_taken(self):
        self.daemon("serve", *DISK, "--fuse", "mnt", *UNIX, *EXPORT)
        self.create("disk2", MIB, "-f", "qcow2")
        said = self.refused("serve", "--disk", "disk2,id=d", "--fuse", "mnt", "--export", "d")
        self.assertIn("mnt", said)
        self.assertTrue(is_mounted(self.path("mnt")))
        self.assertEqual(os.listdir(self.path("mnt")), ["disk0"])
        self.use()


class Permissions(ConflictScene):
    NODES = ("--blockdev", "driver=raw,node-name=base,file.driver=file,file.filename=base",
             "--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=over,"
             "backing=base")

    def setUp(self):
        super().setUp()
        self.create("base", 8 * MIB, "-f", "raw")
        self.overlay("over", "base", 8 * MIB)

    def test_writing_to_a_backing_node(self):
        said = self.refused("serve", *self.NODES, *UNIX, "--export", "base,writable",
                            "--export", "top,writable")
        self.assertIn("NBD export 'base'", said)
        self.assertIn("overlay 'top'", said)
        self.assertFalse(os.path.exists(self.path("m.sock")))

    def test_a_guest_that_writes_to_a_backing_node(self):
        said = self.refused("boot", *self.NODES, *UNIX, "--export", "base,writable", "--append",
                            "job=info")
        self.assertIn("NBD export 'base'", said)
        self.assertIn("overlay 'top'", said)

    def test_reading_a_backing_node(self):
        daemon = self.daemon("serve", *self.NODES, *UNIX, "--export", "base",
                             "--export", "top,writable")
        top = NbdClient(self.path("m.sock"), "top")
        base = NbdClient(self.path("m.sock"), "base")
        top.write(0, b"t" * 4096)
        self.assertEqual(base.read(0, 4096), bytes(4096))
        with self.assertRaises(PermissionError):
            base.write(0, b"b" * 512)
        top.close()
        base.close()
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.check("over")

    def test_a_read_only_node_is_not_exported_writable(self):
        said = self.refused("serve", "--disk", "over,id=disk0,ro", *UNIX, *EXPORT)
        self.assertIn("disk0", said)
        self.assertIn("read-only", said)

    def test_the_file_below_a_format(self):
        said = self.refused("serve", "--blockdev", "driver=file,node-name=f,filename=over",
                            "--blockdev", "driver=qcow2,node-name=top,file=f", *UNIX,
                            "--export", "top,writable", "--export", "f,writable")
        self.assertIn("'f'", said)
        self.assertIn("'top'", said)


if __name__ == "__main__":
    unittest.main(verbosity=2)
