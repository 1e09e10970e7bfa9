#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""kill -9 while the kernel drops pages of a mapped file. It waits for the answer to a READ of such
a page and cannot be interrupted; the process must be gone nevertheless, and the next start on the
same image and directory must work at once."""

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.nbd import CMD_WRITE, NbdClient
from harness.scene import MIB, Scene, wait_until

PAGE = 4096


class Killed(Scene):
    def setUp(self):
        super().setUp()
        self.mount = self.path("mnt")
        with open(self.path("disk"), "wb") as f:
            f.truncate(4 * MIB)
        self.faulting = []
        # Whatever happened, nothing is left that cannot end.
        self.addCleanup(subprocess.run, ["umount", "-f", "-l", self.mount], check=False,
                        stderr=subprocess.DEVNULL)

    def start(self, node="driver=file,node-name=disk0,filename=disk"):
        return self.daemon("serve", "--blockdev", node, "--io-threads", "1",
                           "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                           "--export", "disk0,writable")

    def start_with_reads_that_hang(self):
        return self.start("driver=fault,node-name=disk0,op=read,delay-ns=3600000000000,"
                          "file.driver=file,file.filename=disk")

    def fault_in(self, page):
        """A process that maps the file, touches a page of it and waits for it. This one must not
        have the file open: to close it is a request too."""
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            try:
                fuse = FuseDisk(os.path.join(self.mount, "disk0"))
                view = mmap.mmap(fuse.fd, 4 * MIB, mmap.MAP_SHARED, mmap.PROT_READ)
                view.madvise(mmap.MADV_RANDOM)  # a READ a page
                view[page * PAGE]
            finally:
                os._exit(0)
        self.faulting.append(child)

    def skip_unless_mapped(self):
        fuse = FuseDisk(os.path.join(self.mount, "disk0"))
        try:
            mmap.mmap(fuse.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()
        except OSError as e:
            self.skipTest(f"this kernel maps no file that is opened for direct I/O: {e}")
        finally:
            fuse.close()

    def reads_in_flight(self, daemon):
        start = daemon.errors.count()
        daemon.send(signal.SIGUSR1)
        _, line = daemon.errors.wait(lambda l: "FUSE" in l and "requests so far" in l, start)
        return int(re.search(r"(\d+) in flight", line).group(1))

    def kill_and_start_again(self, daemon):
        daemon.process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        again = self.start()
        self.assertLess(time.monotonic() - began, 8, "the next start was held up")
        daemon.process.wait(10)  # or it is stuck in the kernel
        for child in self.faulting:
            os.waitpid(child, 0)
        fuse = FuseDisk(os.path.join(self.mount, "disk0"))
        self.assertEqual(len(fuse.read(0, PAGE)), PAGE)
        fuse.close()
        self.assert_ended(again, 0, signal.SIGTERM)

    def write_mapped_page(self, page):
        """By another user of the disk: it has to wait until the kernel has dropped the page."""
        nbd = NbdClient(self.path("m.sock"))
        entry = nbd.begin(CMD_WRITE, page * PAGE, PAGE, b"x" * PAGE)
        time.sleep(0.3)
        self.assertFalse(entry["done"].is_set(), "it did not wait: the test tests nothing")

    def test_while_a_read_is_being_answered(self):
        if os.geteuid() != 0:
            self.skipTest("only root can abort such a mount")
        daemon = self.start_with_reads_that_hang()
        self.skip_unless_mapped()
        self.fault_in(0)
        wait_until(lambda: self.reads_in_flight(daemon) == 1, 10, "the READ")
        self.write_mapped_page(0)
        self.kill_and_start_again(daemon)


if __name__ == "__main__":
    unittest.main(verbosity=2)
