#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Threads with filters of system calls: which have one, and that all goes on with it."""

import glob
import mmap
import os
import signal
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL
from harness.scene import MIB, Scene, run, wait_until


class Confined(Scene):
    def confined(self, vm):
        found = set()
        for task in glob.glob(f"/proc/{vm.pid}/task/*"):
            try:
                with open(task + "/status", encoding="ascii") as f:
                    status = dict(line.split(":", 1) for line in f)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if status["Seccomp"].strip() == "2":
                found.add(status["Name"].strip())
        return found

    def test_threads_that_guests_and_clients_talk_to(self):
        kinds = {"vcpu0", "vcpu1", "serial-in", "serial-out", "serial-socket", "io-0", "io-1"}
        for options, wanted in (((), kinds), (("--no-seccomp",), set())):
            vm = self.daemon("boot", "--memory", "64M", "--cpus", "2", "--append", SHELL,
                             "--io-threads", "2", "--serial", "unix:s.sock", *options)
            # Each thread does it at its own start.
            wait_until(lambda: self.confined(vm) & kinds == wanted, 30,
                       f"filters of {wanted}: {self.confined(vm)}")
            self.assert_ended(vm, 0, signal.SIGTERM)

    def all_goes_on(self, backend):
        """Ways through a daemon whose threads can open nothing: decompression, a pool's first
        thread, a mapped file, a connection that is made again. At the end neither a socket nor a
        mount is left."""
        with open(self.path("base.raw"), "wb") as f:
            f.write(bytes(range(256)) * 4096)
        status, text = run(["qemu-img", "convert", "-c", "-O", "qcow2", self.path("base.raw"),
                            self.path("packed")])
        self.assertEqual(status, 0, text)
        self.create("remote.raw", MIB, "-f", "raw")
        serve = ("serve", "--disk", "remote.raw,format=raw", "--export", "disk0,writable", "--nbd",
                 "nbd+unix:///?socket=remote.sock")
        far = ("driver=nbd,node-name=far,server.type=unix,server.path=remote.sock,export=disk0,"
               "reconnect-delay=20")
        remote = self.daemon(*serve)
        vm = self.daemon("serve", "--disk", "packed,id=packed", "--io-backend", backend,
                         "--blockdev", far, "--export", "packed,writable", "--export",
                         "far,writable", "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt")

        def by_nbd(export, *commands):
            status, text = run(["qemu-io", "-f", "raw", *(w for c in commands for w in ("-c", c)),
                                f"nbd+unix:///{export}?socket={self.path('m.sock')}"])
            self.assertEqual(status, 0, text)
            self.assertNotIn("failed", text)

        with open(self.path("mnt/packed"), "rb") as f:
            self.assertEqual(f.read(256), bytes(range(256)))
            try:
                mapped = mmap.mmap(f.fileno(), 4096, prot=mmap.PROT_READ)
            except OSError:  # this kernel maps no file that is opened for direct I/O
                mapped = None
            before = mapped and mapped[:4]
            by_nbd("packed", "write -P 7 0 64k", "discard 64k 64k", "write -z 128k 64k", "flush")
            if mapped:
                # The page is taken back, by a thread that was made just now.
                self.assertEqual(before, bytes(range(4)))
                wait_until(lambda: mapped[:4] == b"\7" * 4, 5, "what is written is seen")
                self.assertIn("fuse-drop-pages", self.confined(vm))
                mapped.close()
        self.assert_ended(remote, 0, signal.SIGTERM)
        remote = self.daemon(*serve)
        by_nbd("far", "write -P 9 0 4k", "flush", "read -P 9 0 4k")
        found = self.confined(vm)
        self.assertTrue({"io-0", "work-0"} <= found, found)
        self.assertFalse([name for name in found if name.startswith("errands")])
        self.assert_ended(vm, 0, signal.SIGTERM)
        self.assertNotIn("not permitted", vm.errors.text())
        self.assert_ended(remote, 0, signal.SIGTERM)
        self.assertFalse(os.path.exists(self.path("m.sock")))
        self.assertFalse(os.path.exists(self.path("mnt")))

    def test_all_goes_on_with_io_uring(self):
        self.all_goes_on("io_uring")

    def test_all_goes_on_with_epoll(self):
        self.all_goes_on("epoll")


if __name__ == "__main__":
    unittest.main()
