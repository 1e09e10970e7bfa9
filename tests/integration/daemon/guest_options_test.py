#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What `boot` makes of its options for a kernel. The kernel is the probe guest, given as a file."""

import os
import select
import signal
import socket
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import SHELL, minivmm
from harness.scene import MIB, Scene, run

PROBE = os.environ["MINIVMM_PROBE_ELF"]
MOST_DEVICES = 19


class GuestOptions(Scene):
    def kernel(self, *arguments):
        vm = self.boot("--kernel", PROBE, "--devices", "command-line", *arguments)
        self.look(vm)
        return vm

    def look(self, vm):
        """Its state is among the lines: what follows a second one's begin is not a part of it."""
        at = 0
        for _ in range(2):
            vm.send(signal.SIGUSR1)
            at, _ = vm.errors.wait(lambda line: line == "minivmm: state", at)
            at += 1
        vm.errors.wait(lambda line: "guest: running" in line)
        vm.errors.wait(lambda line: "disk0: virtio block" in line)

    def has_rng(self, vm):
        return any("rng: virtio" in line for line in vm.errors.lines)

    def disks(self, count):
        return [word for i in range(count)
                for word in ("--disk", f"driver=memory,size={MIB},node-name=disk{i}")]

    def test_a_kernel_gets_an_entropy_device_behind_its_disks(self):
        vm = self.kernel(*self.disks(1))
        self.assertTrue(self.has_rng(vm))
        # The disk is where it was without it, and works.
        vm.job("write disk=0 seed=1 length=64K")
        vm.job("verify disk=0 seed=1 length=64K")
        vm.type("exit")
        self.assert_ended(vm)

    def test_no_entropy_device_on_request(self):
        self.assertFalse(self.has_rng(self.kernel("--no-rng", *self.disks(1))))

    def test_a_machine_full_of_disks_does_without(self):
        self.assertTrue(self.has_rng(self.kernel(*self.disks(MOST_DEVICES - 1))))
        self.assertFalse(self.has_rng(self.kernel(*self.disks(MOST_DEVICES))))

    def test_the_probe_guest_gets_none(self):
        vm = self.boot(*self.disks(1))
        self.look(vm)
        self.assertFalse(self.has_rng(vm))

    def test_memory_that_is_taken_at_the_start(self):
        vm = self.boot("--prealloc", *self.disks(1))
        with open(f"/proc/{vm.pid}/status", encoding="ascii") as status:
            resident = next(int(l.split()[1]) for l in status if l.startswith("VmRSS:"))
        self.assertGreaterEqual(resident, 64 * 1024)

    def test_wrong_values_are_refused(self):
        for options, text in ((("--devices", "foo"), "auto, acpi or command-line"),
                              (("--hugetlb", "3M"), "only of 2 MiB and 1 GiB"),
                              (("--hugetlb", "2X"), "hugetlb")):
            self.assertIn(text, self.refused("boot", *options, *self.disks(1)))


class Reboot(Scene):
    def start(self, *arguments):
        return self.boot("--disk", f"driver=memory,node-name=disk0,size={MIB}", "--export",
                         "disk0,writable", "--nbd", "nbd+unix:///?socket=m.sock", *arguments)

    def test_ends_the_machine_unless_asked(self):
        vm = self.start()
        vm.type("reboot")
        self.assert_ended(vm)
        self.assertIn("the guest reset itself", vm.errors.text())

    def by_nbd(self, command):
        status, text = run(["qemu-io", "-f", "raw", "-c", command,
                            f"nbd+unix:///disk0?socket={self.path('m.sock')}"])
        self.assertEqual(status, 0, text)
        self.assertNotIn("failed", text)

    def test_starts_the_guest_again_on_the_same_disks(self):
        vm = self.start("--on-reboot", "restart", "--cpus", "2", "--io-threads", "2",
                        "--pin", "io1=0")
        heard = 0
        for life in range(3):
            vm.job("write length=64K pattern=0x%x" % (life + 1))
            self.by_nbd("read -P %d 0 64k" % (life + 1))
            self.by_nbd("write -P %d 64k 64k" % (life + 17))
            heard = vm.output.count()
            vm.type("reboot")
            vm.output.wait(lambda line: line.startswith("probe: shell"), heard)
            # What both wrote is there: a memory disk lives as long as its node.
            vm.job("verify length=64K pattern=0x%x" % (life + 1))
            vm.job("verify offset=64K length=64K pattern=0x%x" % (life + 17))
        vm.send(signal.SIGUSR1)
        vm.errors.wait(lambda line: "guest: running" in line)
        # Other ends stay ends.
        vm.type("exit 5")
        self.assert_ended(vm, 5)
        text = vm.errors.text()
        self.assertEqual(text.count("it starts again"), 3, text)
        self.assertNotRegex(text, "error:|not permitted")

    def test_a_guest_that_always_resets_does_not_flood_the_log(self):
        vm = self.start("--on-reboot", "restart")
        began = time.monotonic()
        for _ in range(40):
            heard = vm.output.count()
            vm.type("reboot")
            vm.output.wait(lambda line: line.startswith("probe: shell"), heard)
        seconds = time.monotonic() - began
        vm.type("exit")
        self.assert_ended(vm)
        told = vm.errors.text().count("it starts again")
        # Five in each second of the clock.
        self.assertGreaterEqual(told, 1)
        self.assertLessEqual(told, 5 * (int(seconds) + 2))

    def test_a_signal_ends_it_also_while_it_starts_again(self):
        vm = self.start("--on-reboot", "restart")
        vm.type("reboot")
        self.assert_ended(vm, 0, signal.SIGTERM)

    def test_says_what_it_takes(self):
        self.assertIn("exit or restart", self.refused("boot", "--on-reboot", "stop"))


class TwoWriters(Scene):
    """A writable export of what a kernel may have mounted is warned of."""
    WARNING = "destroys"

    def errors(self, *arguments):
        vm = self.daemon("boot", "--memory", "64M", "--append", SHELL, "--nbd",
                         "nbd+unix:///?socket=m.sock", *arguments)
        self.assert_ended(vm, 0, signal.SIGTERM)
        return vm.errors.text()

    def test_warns_where_both_can_write(self):
        disk = ("--disk", f"driver=memory,node-name=disk0,size={MIB}")
        kernel = ("--kernel", PROBE, "--devices", "command-line")
        text = self.errors(*kernel, *disk, "--export", "disk0,name=x,writable")
        self.assertRegex(text, f"warning: export 'x' is writable.*{self.WARNING}")
        for quiet in ((*kernel, *disk, "--export", "disk0"),
                      (*kernel, *disk, "--disk", f"driver=memory,node-name=b,size={MIB},read-only=on",
                       "--export", "b"),
                      (*disk, "--export", "disk0,writable")):
            self.assertNotIn(self.WARNING, self.errors(*quiet))


class NoKvm(Scene):
    """Where guests cannot run, the first line says why and what to do; all else works."""

    def hidden(self, *arguments, script):
        """Our program in a mount namespace that was changed by `script`."""
        return run(["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh", *arguments])

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest("only root may hide /dev/kvm")

    def test_no_device(self):
        hide = "mount -t tmpfs none /dev && cd " + self.dir
        status, text = self.hidden(minivmm(), "boot", "--serial", "none", script=hide)
        self.assertEqual(status, 1)
        self.assertRegex(text.split("\n")[0], "/dev/kvm does not exist: .*everything else works")
        status, text = self.hidden(minivmm(), "check-host", script=hide)
        self.assertEqual(status, 1)
        self.assertRegex(text, r"missing +kvm .*/dev/kvm")
        status, text = self.hidden(minivmm(), "image", "create", "-f", "qcow2", "x.qcow2", "1M",
                                   script=hide)
        self.assertEqual(status, 0, text)

    def test_no_permission(self):
        # Only the group may, and a user who is not in it tries.
        os.chmod(self.dir, 0o755)
        os.mkdir(self.path("t"))
        status, text = self.hidden(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "t/minivmm", "boot",
            "--serial", "none", script=f"cd {self.dir} && mount -t tmpfs none t && "
            f"cp {minivmm()} t/minivmm && mknod t/kvm c 10 232 && chmod 660 t/kvm && "
            "mount --bind t/kvm /dev/kvm")
        self.assertEqual(status, 1)
        self.assertRegex(text.split("\n")[0], "/dev/kvm: permission denied: run as a member of")


class SerialPort(Scene):
    def start(self, where):
        return self.daemon("boot", "--memory", "64M", "--append", SHELL, "--serial", where,
                           "--disk", f"driver=memory,size={MIB}")

    def talk(self, fd, line, wanted):
        """Types a line; returns what the guest said up to `wanted`."""
        os.write(fd, line)
        got = b""
        until = time.monotonic() + 30
        while wanted not in got:
            self.assertTrue(select.select([fd], [], [], max(0, until - time.monotonic()))[0],
                            f"no {wanted} in {got}")
            piece = os.read(fd, 4096)
            self.assertTrue(piece, f"ended without {wanted}: {got}")
            got += piece
        return got

    def test_on_a_socket(self):
        vm = self.start("unix:s.sock")
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.path("s.sock"))
                self.talk(client.fileno(), b"info\n", b"probe: info ok")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path("s.sock"))
            # Bytes pass as they are: no key of ours.
            self.talk(client.fileno(), b"\x01xinfo\n", b"no such job")
            client.sendall(b"exit 7\n")
            self.assert_ended(vm, 7)
            said = b""
            while piece := client.recv(4096):
                said += piece
            self.assertNotIn(b"info", said)
        self.assertFalse(os.path.exists(self.path("s.sock")))

    def test_what_nobody_heard_is_for_the_first_client(self):
        vm = self.start("unix:s.sock")
        time.sleep(1)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path("s.sock"))
            self.talk(client.fileno(), b"", b"probe: shell")
        self.assert_ended(vm, 0, signal.SIGTERM)

    def test_on_a_pseudoterminal_with_an_escape_key(self):
        vm = self.start("pty")
        _, line = vm.errors.wait(lambda l: "serial port is /dev/" in l)
        for _ in range(2):  # it does not hang up between two users
            terminal = os.open(line.split()[-1], os.O_RDWR | os.O_NOCTTY)
            self.talk(terminal, b"info\n", b"probe: info ok")
            os.close(terminal)
        terminal = os.open(line.split()[-1], os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, b"\x01x")
        self.assert_ended(vm)
        os.close(terminal)

    def test_wrong_places_are_refused(self):
        for where in ("tty", "file", "unix:", "file:/nonexistent/x", "unix:/nonexistent/x"):
            self.assertIn(f"--serial {where}", self.refused("boot", "--serial", where))


if __name__ == "__main__":
    unittest.main()
