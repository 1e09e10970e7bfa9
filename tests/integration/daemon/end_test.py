#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How a daemon ends: by signals with everything in use, by force where something hangs, and with the
guest's status; and what it shows of itself meanwhile."""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.nbd import CMD_WRITE, NbdClient
from harness.scene import MIB, Scene, is_mounted, wait_until

UNIX = ("--nbd", "nbd+unix:///?socket=m.sock")
FUSE = ("--fuse", "mnt")
EXPORT = ("--export", "disk0,writable")


class EndScene(Scene):
    def setUp(self):
        super().setUp()
        self.create("disk", 16 * MIB, "-f", "qcow2")

    def assert_nothing_left(self):
        self.assertFalse(os.path.lexists(self.path("m.sock")), "the socket is left behind")
        self.assertFalse(os.path.lexists(self.path("pid")), "the pid file is left behind")
        self.assertFalse(is_mounted(self.path("mnt")), "still mounted")


class Ending(EndScene):
    def end_in_use(self, number):
        """A FUSE file open, an NBD client connected, a guest at work, all with unflushed writes."""
        vm = self.boot("--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT, "--pid-file", "pid")
        nbd = NbdClient(self.path("m.sock"))
        fuse = FuseDisk(self.path("mnt/disk0"))
        vm.job("write offset=0 length=65536 pattern=7")
        nbd.write(MIB, b"n" * 4096)
        fuse.write(2 * MIB, b"f" * 4096)
        vm.begin_job("bench randwrite offset=4M length=4M seconds=60")
        time.sleep(0.2)
        began = time.monotonic()
        vm.send(number)
        # A client that keeps its connection does not keep the daemon.
        self.assert_ended(vm, 0, limit=15)
        self.assertLess(time.monotonic() - began, 8)
        with self.assertRaises(OSError):
            nbd.read(0, 512)
        with self.assertRaises(OSError):
            fuse.read(0, 512)
        fuse.close()
        nbd.close()
        self.assert_nothing_left()
        self.check("disk")
        # Unflushed as it was, a clean end has brought it all to the file.
        self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *EXPORT)
        nbd = NbdClient(self.path("m.sock"))
        self.assertEqual(nbd.read(0, 65536), bytes([7]) * 65536)
        self.assertEqual(nbd.read(MIB, 4096), b"n" * 4096)
        self.assertEqual(nbd.read(2 * MIB, 4096), b"f" * 4096)
        nbd.close()

    def test_sigterm(self):
        self.end_in_use(signal.SIGTERM)

    def test_sigint(self):
        self.end_in_use(signal.SIGINT)

    def test_sighup(self):
        self.end_in_use(signal.SIGHUP)

    def test_requests_in_flight_are_finished(self):
        """A write that was answered while the end was under way is there afterwards."""
        daemon = self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT)
        written = []
        nbd = NbdClient(self.path("m.sock"))

        def write():
            try:
                for number in range(1 << 20):
                    nbd.write(number % 256 * 65536, number.to_bytes(8, "little") * 64)
                    written.append(number)
            except OSError:
                pass
        threads = [threading.Thread(target=write)]
        threads[0].start()
        wait_until(lambda: len(written) > 300, 30, "writes")
        self.assert_ended(daemon, 0, signal.SIGTERM)
        threads[0].join(10)
        self.check("disk")
        self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *EXPORT)
        again = NbdClient(self.path("m.sock"))
        last = {number % 256: number for number in written}
        for slot, number in last.items():
            found = int.from_bytes(again.read(slot * 65536, 8), "little")
            # The one that was never answered may be there too.
            self.assertIn(found, (number, len(written)), f"slot {slot}")
        again.close()

    def test_status_of_the_guest(self):
        for line, status in (("exit 0", 0), ("exit 7", 7), ("exit 255", 255)):
            vm = self.boot("--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT)
            vm.type(line)
            self.assert_ended(vm, status)
            self.assert_nothing_left()

    def test_status_of_a_job_that_fails(self):
        vm = self.boot("--disk", "disk,id=disk0,ro")
        vm.failed_job("write offset=0 length=4096")
        vm.type("exit")
        self.assert_ended(vm, 1)

    def test_unmounted_by_somebody_else(self):
        daemon = self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT)
        subprocess.run(["umount", self.path("mnt")], check=True)
        daemon.errors.wait(lambda l: "unmounted" in l)
        nbd = NbdClient(self.path("m.sock"))
        nbd.write(0, b"x" * 512)
        nbd.close()
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.assert_nothing_left()

    def test_usr1_shows_the_state(self):
        vm = self.boot("--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT)
        nbd = NbdClient(self.path("m.sock"))
        for _ in range(3):
            start = vm.errors.count()
            vm.send(signal.SIGUSR1)
            vm.errors.wait(lambda l: "state" in l, start)
            for word in ("disk0", "qcow2", "NBD export 'disk0'", "FUSE export 'disk0'",
                         "guest disk 'disk0'", "in flight", self.path("m.sock"), "mnt"):
                vm.errors.wait(lambda l, word=word: word in l, start, 10)
        nbd.close()
        self.assert_ended(vm, 0, signal.SIGTERM)


class SlowScene(EndScene):
    SLOW = "driver=fault,node-name=disk0,op={},errno=none,delay-ns={}," \
           "file.driver=qcow2,file.file.driver=file,file.file.filename=disk"
    # The image's file answers reads after this time, which opening it needs.
    SLOW_START = "driver=qcow2,node-name=disk0,file.driver=fault,file.op=read,file.errno=none," \
                 "file.delay-ns={},file.file.driver=file,file.file.filename=disk"

    def slow(self, command, op, *options, delay=600.0):
        node = self.SLOW.format(op, int(delay * 1e9))
        what = ("--blockdev", node) if command == "serve" else ("--disk", node)
        start = self.daemon if command == "serve" else self.boot
        return start(*(("serve",) if command == "serve" else ()), *what, *UNIX, *FUSE, *EXPORT,
                     *options)


class Patience(SlowScene):
    """An end that takes a while is let finish, unless somebody insists."""

    def begin_slow_end(self, daemon, number):
        nbd = NbdClient(self.path("m.sock"))
        nbd.write(0, b"x" * 512)
        daemon.send(number)
        daemon.errors.wait(lambda l: "shutting down" in l)
        time.sleep(0.3)
        self.assertIsNone(daemon.process.poll(), "the flush was to take longer")
        self.addCleanup(nbd.close)

    def test_a_closed_terminal_hangs_up_twice(self):
        daemon = self.slow("serve", "flush", delay=1.5)
        self.begin_slow_end(daemon, signal.SIGHUP)
        daemon.send(signal.SIGHUP)
        self.assert_ended(daemon, 0)
        self.assert_nothing_left()

    def test_a_service_manager_hangs_up_too(self):
        daemon = self.slow("serve", "flush", delay=1.5)
        self.begin_slow_end(daemon, signal.SIGTERM)
        daemon.send(signal.SIGHUP)
        self.assert_ended(daemon, 0)
        self.assert_nothing_left()

    def test_a_first_signal_while_the_guests_end_is_under_way(self):
        vm = self.slow("boot", "flush", delay=1.5)
        vm.job("write offset=0 length=512")
        vm.type("exit 7")
        vm.output.wait(lambda l: "probe: done" in l)
        time.sleep(0.5)
        vm.send(signal.SIGTERM)
        self.assert_ended(vm, 7)
        self.assert_nothing_left()

    def test_a_signal_in_the_middle_of_a_slow_start(self):
        for _ in range(2):
            daemon = self.daemon("serve", "--blockdev", self.SLOW_START.format(200000000), *UNIX,
                                 *FUSE, *EXPORT, "--pid-file", "pid", ready=False)
            wait_until(lambda: os.path.exists(self.path("pid")), 20, "the start")
            daemon.send(signal.SIGTERM)
            daemon.errors.wait(lambda l: "shutting down" in l)
            self.assertFalse(os.path.lexists(self.path("m.sock")), "it was to be early")
            self.assert_ended(daemon, 0)
            self.assert_nothing_left()


class Hang(SlowScene):
    """Writes to the disk take minutes. The end is forced, and says what was not flushed."""

    def write_and_hang(self, daemon, through):
        nbd = fuse = None
        if through == "nbd":
            nbd = NbdClient(self.path("m.sock"))
            nbd.begin(CMD_WRITE, 0, 512, b"x" * 512)
        elif through == "fuse":
            fuse = FuseDisk(self.path("mnt/disk0"))

            def write():
                with self.assertRaises(OSError):
                    fuse.write(0, b"x" * 512)
            threading.Thread(target=write, daemon=True).start()
        else:
            daemon.begin_job("write offset=0 length=512")
        # Visible in the state, so it is under way.
        def under_way():
            start = daemon.errors.count()
            daemon.send(signal.SIGUSR1)
            daemon.errors.wait(lambda l: "state" in l, start)
            time.sleep(0.1)
            return any(" 1 in flight" in l or "in flight: 1" in l or "1 request" in l
                       for l in daemon.errors.lines[start:])
        wait_until(under_way, 10, "the hanging write")
        self.addCleanup(lambda: [d.close() for d in (nbd, fuse) if d])

    def assert_forced(self, daemon, least, most, began):
        self.assertEqual(daemon.wait(most + 20), 1)
        took = time.monotonic() - began
        self.assertGreaterEqual(took, least)
        self.assertLess(took, most)
        said = daemon.errors.text()
        said = said[said.rindex("ending now"):]
        self.assertIn("not flushed", said)
        self.assertIn("disk0", said)
        # Nothing is in the way of the next start.
        next_one = self.daemon("serve", "--disk", "disk,id=disk0", *UNIX, *FUSE, *EXPORT)
        self.assert_ended(next_one, 0, signal.SIGTERM)
        self.assert_nothing_left()

    def test_timeout(self):
        for through, command in (("nbd", "serve"), ("fuse", "serve"), ("guest", "boot")):
            with self.subTest(through=through):
                daemon = self.slow(command, "write", "--shutdown-timeout", "1")
                self.write_and_hang(daemon, through)
                began = time.monotonic()
                daemon.send(signal.SIGTERM)
                self.assert_forced(daemon, 0.9, 9, began)

    def test_timeout_of_a_flush(self):
        daemon = self.slow("serve", "flush", "--shutdown-timeout", "1")
        nbd = NbdClient(self.path("m.sock"))
        nbd.write(0, b"x" * 512)
        began = time.monotonic()
        daemon.send(signal.SIGTERM)
        self.assert_forced(daemon, 0.9, 9, began)
        nbd.close()

    def test_second_signal(self):
        for through, command in (("nbd", "serve"), ("fuse", "serve"), ("guest", "boot")):
            with self.subTest(through=through):
                daemon = self.slow(command, "write", "--shutdown-timeout", "100")
                self.write_and_hang(daemon, through)
                daemon.send(signal.SIGINT)
                daemon.errors.wait(lambda l: "shutting down" in l)
                time.sleep(0.3)
                self.assertIsNone(daemon.process.poll())
                began = time.monotonic()
                daemon.send(signal.SIGINT)
                self.assert_forced(daemon, 0, 3, began)

    def test_a_start_that_hangs(self):
        slow = ("serve", "--blockdev", self.SLOW_START.format(600000000000), *UNIX, *FUSE, *EXPORT,
                "--pid-file", "pid")
        # A second signal, or the time after the first one.
        for timeout, signals, limit in (("100", 2, 3), ("0", 1, 9)):
            daemon = self.daemon(*slow, "--shutdown-timeout", timeout, ready=False)
            wait_until(lambda: os.path.exists(self.path("pid")), 20, "the start")
            time.sleep(0.3)
            daemon.send(signal.SIGUSR1)
            daemon.errors.wait(lambda l: "start has not ended" in l)
            began = time.monotonic()
            for _ in range(signals):
                at = daemon.errors.count()
                daemon.send(signal.SIGTERM)
                if signals > 1 and _ == 0:
                    daemon.errors.wait(lambda l: "shutting down" in l, at)
            self.assertEqual(daemon.wait(20), 1)
            self.assertLess(time.monotonic() - began, limit)
            self.assertIn("in the middle of the start", daemon.errors.text())
            self.assert_nothing_left()

    def test_one_disk_that_hangs_costs_the_others_nothing(self):
        self.create("other", 16 * MIB, "-f", "qcow2")
        # Its flush needs a while, which it has all the same.
        other = self.SLOW.format("flush", 400000000).replace("=disk0", "=disk1")
        vm = self.slow("boot", "write", "--disk", other.replace("filename=disk", "filename=other"),
                       "--shutdown-timeout", "2")
        vm.job("write disk=1 offset=0 length=65536 pattern=7")
        self.write_and_hang(vm, "guest")
        began = time.monotonic()
        vm.send(signal.SIGTERM)
        self.assert_forced(vm, 1.9, 10, began)
        # Never flushed by the guest, and in a cluster that only the metadata in memory knew.
        self.check("other")
        self.daemon("serve", "--disk", "other,id=disk1", *UNIX, "--export", "disk1")
        nbd = NbdClient(self.path("m.sock"), export="disk1")
        self.assertEqual(nbd.read(0, 65536), bytes([7]) * 65536)
        nbd.close()

    def test_the_terminal_is_given_back(self):
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        self.addCleanup(os.close, slave)
        cooked = termios.ICANON | termios.ECHO | termios.ISIG

        def local():
            return termios.tcgetattr(slave)[3] & cooked
        script = f'exec "$@" <{os.ttyname(slave)}'
        vm = self.daemon("boot", "--memory", "64M", "--disk",
                         self.SLOW.format("write", 600 * 10**9), "--append",
                         "job=write:offset=0:length=512", "--shutdown-timeout", "100",
                         prefix=("bash", "-c", script, "bash"))
        wait_until(lambda: local() == 0, 20, "a raw terminal")
        time.sleep(1)  # the write hangs
        vm.send(signal.SIGTERM)
        # While the end hangs, Ctrl-C is for us and not for the guest.
        wait_until(lambda: local() == cooked, 5, "the terminal's settings")
        self.assertIsNone(vm.process.poll())
        vm.send(signal.SIGINT)
        self.assertEqual(vm.wait(10), 1)
        self.assertEqual(local(), cooked)


if __name__ == "__main__":
    unittest.main(verbosity=2)
