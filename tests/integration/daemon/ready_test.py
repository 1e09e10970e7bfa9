#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""How a daemon comes up: what it tells others, that what appears can be used, and that a start that
fails leaves nothing behind."""

import os
import signal
import socket
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, is_mounted, wait_until


class ReadyScene(Scene):
    def setUp(self):
        super().setUp()
        self.create("disk", 8 * MIB, "-f", "qcow2")
        self.disk = ("--disk", "disk,id=disk0")
        self.unix = ("--nbd", "nbd+unix:///?socket=m.sock")
        self.fuse = ("--fuse", "mnt")
        self.export = ("--export", "disk0,writable")

    def use(self, export="disk0", **where):
        client = NbdClient(export=export, **where)
        client.write(4096, b"x" * 512)
        self.assertEqual(client.read(4096, 512), b"x" * 512)
        client.close()

    def assert_nothing_left(self):
        for name in ("m.sock", "pid"):
            self.assertFalse(os.path.lexists(self.path(name)), f"{name} is left behind")
        stray = [n for n in os.listdir(self.dir) if n.startswith(".")]
        self.assertEqual(stray, [], "hidden files are left behind")
        self.assertFalse(is_mounted(self.path("mnt")), "still mounted")
        self.check("disk")  # also: not locked any more


class Ready(ReadyScene):
    def test_everything_can_be_used_at_ready(self):
        for _ in range(8):
            daemon = self.daemon("serve", *self.disk, *self.unix, *self.fuse, *self.export)
            fuse = FuseDisk(self.path("mnt/disk0"))
            self.use(path=self.path("m.sock"))
            self.assertEqual(fuse.read(4096, 512), b"x" * 512)
            fuse.close()
            self.assert_ended(daemon, 0, signal.SIGTERM)
            self.assert_nothing_left()

    def test_a_socket_can_be_used_when_it_appears(self):
        for _ in range(5):
            daemon = self.daemon("serve", *self.disk, *self.unix, *self.export, ready=False)
            until = time.monotonic() + 30
            while not os.path.exists(self.path("m.sock")) and time.monotonic() < until:
                pass  # as early as can be
            self.use(path=self.path("m.sock"))
            daemon.wait_ready()
            self.assert_ended(daemon, 0, signal.SIGTERM)

    def test_a_mount_can_be_used_when_it_appears(self):
        for _ in range(5):
            daemon = self.daemon("serve", *self.disk, *self.fuse, *self.export, ready=False)
            wait_until(lambda: is_mounted(self.path("mnt")), 30, "the mount")
            fuse = FuseDisk(self.path("mnt/disk0"))
            self.assertEqual(fuse.size, 8 * MIB)
            fuse.close()
            daemon.wait_ready()
            self.assert_ended(daemon, 0, signal.SIGTERM)

    def test_the_socket_is_private(self):
        self.daemon("serve", *self.disk, *self.unix, *self.export)
        self.assertEqual(os.stat(self.path("m.sock")).st_mode & 0o777, 0o600)

    def test_service_manager_is_told(self):
        for name in (self.path("notify"), f"@minivmm-test-{os.getpid()}"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind("\0" + name[1:] if name.startswith("@") else name)
                notify.settimeout(30)
                daemon = self.daemon("serve", *self.disk, *self.unix, *self.export,
                                     env={"NOTIFY_SOCKET": name})
                self.assertIn(b"READY=1", notify.recv(4096).split(b"\n"))
                self.use(path=self.path("m.sock"))
                daemon.send(signal.SIGTERM)
                self.assertIn(b"STOPPING=1", notify.recv(4096).split(b"\n"))
                self.assert_ended(daemon)

    def test_service_manager_is_not_told_of_a_failed_start(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(self.path("notify"))
            notify.settimeout(0.2)
            self.refused("serve", *self.disk, "--nbd", "nbd+unix:///?socket=none/m.sock",
                         *self.export, env={"NOTIFY_SOCKET": self.path("notify")})
            with self.assertRaises(TimeoutError):
                notify.recv(4096)

    def test_pid_file(self):
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.export, "--pid-file", "pid")
        with open(self.path("pid"), encoding="utf-8") as f:
            self.assertEqual(f.read(), f"{daemon.pid}\n")
        self.create("other", MIB, "-f", "raw")
        said = self.refused("serve", "--disk", "other,format=raw,id=o", "--export", "o",
                            "--nbd", "nbd+unix:///?socket=o.sock", "--pid-file", "pid")
        self.assertIn("pid", said)
        with open(self.path("pid"), encoding="utf-8") as f:
            self.assertEqual(f.read(), f"{daemon.pid}\n", "the refused one changed the file")
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.assert_nothing_left()

    def test_a_pid_file_that_a_crash_left(self):
        with open(self.path("pid"), "w", encoding="utf-8") as f:
            f.write("1\n" * 100)
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.export, "--pid-file", "pid")
        with open(self.path("pid"), encoding="utf-8") as f:
            self.assertEqual(f.read(), f"{daemon.pid}\n")


    def test_closed_standard_descriptors_are_not_given_to_images(self):
        # The log, or the guest's output, would be written into a disk.
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.export,
                             prefix=("bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash"))
        for fd in range(3):
            self.assertEqual(os.readlink(f"/proc/{daemon.pid}/fd/{fd}"), "/dev/null")
        self.use(path=self.path("m.sock"))
        self.assert_ended(daemon, 0, signal.SIGTERM)

    def test_readiness_on_a_standard_descriptor(self):
        # Closed after that, its number would be the next client's, who would get the log.
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.export, "--ready-fd", "2",
                             ready=False, own_ready=False)
        daemon.errors.wait(lambda l: l == "READY")
        for _ in range(3):
            self.use(path=self.path("m.sock"))
        self.assertTrue(os.readlink(f"/proc/{daemon.pid}/fd/2").startswith("pipe:"))
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.assertIn("shutting down", daemon.errors.text())


class Activation(ReadyScene):
    """Sockets that a service manager made and hands over."""

    def setUp(self):
        super().setUp()
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(self.path("given.sock"))
        self.tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.tcp.bind(("127.0.0.1", 0))
        for s in (self.listening, self.tcp):
            s.listen(5)
            self.addCleanup(s.close)

    def activated(self, pid="$$", count=2, nbd="systemd", arguments=(), **more):
        """As systemd does it: descriptors from 3 on, and the process's own id."""
        # Two steps through free numbers, since 3 and 4 may be taken by the sockets themselves.
        script = (f"exec 20<&{self.listening.fileno()} 21<&{self.tcp.fileno()}; "
                  f"exec 3<&20 4<&21 20<&- 21<&-; "
                  f'export LISTEN_PID={pid} LISTEN_FDS={count}; exec "$@"')
        return self.daemon("serve", *self.disk, "--nbd", nbd, *self.export, *arguments,
                           prefix=("bash", "-c", script, "bash"),
                           extra_fds=(self.listening.fileno(), self.tcp.fileno()), **more)

    def test_clients_that_came_before_are_served(self):
        # A service manager starts the daemon when a client comes: that client must be served.
        early = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        early.connect(self.path("given.sock"))
        early.settimeout(30)
        daemon = self.activated()
        self.assertEqual(early.recv(8), b"NBDMAGIC")
        early.close()
        self.use(path=self.path("given.sock"))
        self.use(address=self.tcp.getsockname())
        self.assert_ended(daemon, 0, signal.SIGTERM)
        self.assertTrue(os.path.exists(self.path("given.sock")), "it is not ours to remove")

    def test_sockets_for_somebody_else_are_not_taken(self):
        daemon = self.activated(pid=1, ready=False)
        self.assertEqual(daemon.wait(), 1)
        self.assertIn("LISTEN_FDS", daemon.errors.text())

    def test_a_descriptor_by_number(self):
        daemon = self.activated(nbd="fd:3")
        self.use(path=self.path("given.sock"))
        self.assert_ended(daemon, 0, signal.SIGTERM)

    def test_a_descriptor_has_one_use(self):
        for arguments in (("--nbd", "fd:3"), ("--nbd", "systemd"), ("--ready-fd", "3")):
            daemon = self.activated(nbd="fd:3", arguments=arguments, ready=False, own_ready=False)
            self.assertEqual(daemon.wait(), 1)
            self.assertIn("given twice", daemon.errors.text())

    def test_a_descriptor_that_is_no_socket(self):
        daemon = self.daemon("serve", *self.disk, "--nbd", "fd:0", *self.export, ready=False)
        self.assertEqual(daemon.wait(), 1)
        self.assertIn("0", daemon.errors.text())


class Rollback(ReadyScene):
    """One part cannot start: the others are taken back, and the message names it."""

    def assert_rolled_back(self, names, *arguments, command="boot"):
        append = ("--append", "job=shell") if command == "boot" else ()
        said = self.refused(command, *self.disk, *arguments, *self.export, *append,
                            "--pid-file", "pid")
        for name in names:
            self.assertIn(name, said)
        errors = [l for l in said.splitlines() if "error" in l or not l.startswith("minivmm: ")]
        self.assertEqual(errors, [], f"noise beside the message: {said}")
        self.assert_nothing_left()
        # And it can be started at once where the mistake is corrected.
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.fuse, *self.export,
                             "--pid-file", "pid")
        self.assert_ended(daemon, 0, signal.SIGTERM)

    def test_socket_in_a_missing_directory(self):
        for command in ("serve", "boot"):
            self.assert_rolled_back(["missing/m.sock"], *self.fuse, *self.unix, "--nbd",
                                    "nbd+unix:///?socket=missing/m.sock", command=command)

    def test_fuse_directory_that_is_not_empty(self):
        os.mkdir(self.path("full"))
        open(self.path("full/file"), "wb").close()
        self.assert_rolled_back(["full"], *self.unix, *self.fuse, "--fuse", "full")
        self.assertEqual(os.listdir(self.path("full")), ["file"])

    def test_fuse_directory_that_is_a_file(self):
        open(self.path("file"), "wb").close()
        self.assert_rolled_back(["file"], *self.unix, *self.fuse, "--fuse", "file")

    def test_a_port_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            self.assert_rolled_back([str(port)], *self.unix, *self.fuse,
                                    "--nbd", f"nbd://127.0.0.1:{port}")

    def test_a_kernel_that_is_not_there(self):
        self.assert_rolled_back(["no/vmlinux"], *self.unix, *self.fuse, "--kernel", "no/vmlinux")

    def test_a_kernel_that_is_none(self):
        with open(self.path("junk"), "wb") as f:
            f.write(self.random.randbytes(9000))
        self.assert_rolled_back(["junk"], *self.unix, *self.fuse, "--kernel", "junk")

    def test_an_export_of_an_unknown_node(self):
        self.assert_rolled_back(["nosuch"], *self.unix, *self.fuse, "--export", "nosuch")

    def test_a_disk_that_is_not_there(self):
        self.assert_rolled_back(["gone.qcow2"], *self.unix, *self.fuse, "--disk",
                                "gone.qcow2,format=qcow2")

    def test_a_ready_descriptor_that_is_closed(self):
        daemon = self.daemon("serve", *self.disk, *self.unix, *self.fuse, *self.export,
                             "--pid-file", "pid", "--ready-fd", "977", ready=False,
                             own_ready=False)
        self.assertEqual(daemon.wait(), 1)
        self.assertIn("--ready-fd 977", daemon.errors.text())
        self.assert_nothing_left()

    def test_a_ready_descriptor_that_is_closed_is_not_one_of_ours(self):
        # Each of these numbers is soon an image, a ring or a socket.
        for number in range(3, 16):
            daemon = self.daemon("serve", *self.disk, *self.unix, *self.fuse, *self.export,
                                 "--ready-fd", number, ready=False, own_ready=False)
            self.assertEqual(daemon.wait(), 1)
            self.assertIn(f"descriptor {number} is not open", daemon.errors.text())
            self.assertNotIn("NBD", daemon.errors.text())
        self.assert_nothing_left()

    def test_a_mount_directory_that_was_made_is_removed(self):
        self.assert_rolled_back(["missing/m.sock"], *self.fuse, "--nbd",
                                "nbd+unix:///?socket=missing/m.sock")
        self.assertFalse(os.path.exists(self.path("mnt")))

    def test_a_directory_of_the_user_stays(self):
        os.mkdir(self.path("mnt"))
        self.assert_rolled_back(["missing/m.sock"], *self.fuse, "--nbd",
                                "nbd+unix:///?socket=missing/m.sock")
        self.assertTrue(os.path.isdir(self.path("mnt")))


class Arguments(ReadyScene):
    """What is called wrongly ends at once with status 1 and one line that says what is wrong."""

    CASES = (
        (("serve",), "nothing to serve"),
        (("serve", "--disk", "disk"), "nothing to serve"),
        (("serve", "--disk", "disk", "--export", "disk0"), "no front end"),
        (("serve", "--disk", "disk", "--nbd", "nbd://127.0.0.1:0"), "--export"),
        (("serve", "--disk", "", "--export", "x", "--fuse", "mnt"), "path"),
        (("serve", "--disk", "disk", "--nbd", "nbd://127.0.0.1:0", "--export", "disk0,nbd,fuse"),
         "--fuse"),
        (("serve", "--bogus"), "bogus"),
        (("serve", "disk"), "disk"),
        (("nosuch",), "nosuch"),
        (("serve", "--io-threads", "many"), "many"),
        (("serve", "--io-threads", "0", "DISK"), "io-threads"),
        (("serve", "--io-backend", "magic", "DISK"), "magic"),
        (("serve", "--log-level", "loud", "DISK"), "loud"),
        (("serve", "--shutdown-timeout", "-1", "DISK"), "shutdown-timeout"),
        (("serve", "--disk", "disk,cache=bogus", "DISK"), "bogus"),
        (("serve", "--disk", "disk,colour=red", "DISK"), "colour"),
        (("serve", "--disk", "disk,format=vmdk", "DISK"), "vmdk"),
        (("serve", "--disk", "disk,offset=1M", "DISK"), "offset"),
        (("serve", "--disk", "disk,id=a,id=b", "DISK"), "id"),
        (("serve", "--blockdev", "driver=qcow2", "DISK"), "file"),
        (("serve", "--blockdev", "driver=nosuch,node-name=x", "DISK"), "nosuch"),
        (("serve", "--blockdev", "{\"driver\":", "DISK"), "JSON"),
        (("serve", "--blockdev", "{\"driver\":1}", "DISK"), "driver"),
        (("serve", "--export", "disk0,colour=red", "DISK"), "colour"),
        (("serve", "--export", "disk0", "DISK"), "disk0"),
        (("serve", "--nbd", "http://x", "DISK"), "http"),
        (("serve", "--nbd", "nbd://127.0.0.1:99999", "DISK"), "99999"),
        (("serve", "--nbd", "nbd+unix:///", "DISK"), "socket"),
        (("serve", "--nbd", f"nbd+unix:///?socket={'a' * 300}", "DISK"), "socket"),
        (("serve", "--nbd", "nbd://0.0.0.0:0", "DISK"), "nbd-allow-remote"),
        (("serve", "--nbd", "fd:abc", "DISK"), "fd"),
        (("serve", "--nbd", "fd:900", "DISK"), "900"),
        (("serve", "--nbd", "systemd", "DISK"), "LISTEN_FDS"),
        (("serve", "--fuse", "m2,mode=999", "DISK"), "mode"),
        (("serve", "--fuse", "m2,uid=x", "DISK"), "uid"),
        (("serve", "--fuse", "no/such/dir", "DISK"), "no/such/dir"),
        (("serve", "--pid-file", "no/pid", "DISK"), "no/pid"),
        (("boot", "--memory", "lots"), "lots"),
        (("boot", "--memory", "1"), "memory"),
        (("boot", "--memory", "999999T"), "memory"),
        (("boot", "--cpus", "0"), "cpus"),
        (("boot", "--cpus", "100000"), "cpus"),
        (("boot", "--serial", "nowhere"), "nowhere"),
        (("boot", "--serial", "file:no/such/file"), "no/such/file"),
        (("boot", "--initrd", "no-initrd"), "initrd"),
        (("boot", "--append", "x" * 100000), "command line"),
        (("boot", "--disk", "disk,serial=" + "s" * 21), "serial"),
        (("boot", "--disk", "disk,num-queues=0"), "num-queues"),
        (("boot", "--disk", "disk,queue-size=100"), "queue-size"),
        (("boot", "--disk", "disk,logical_block_size=1000"), "logical_block_size"),
        (("boot", "--disk", "disk,logical_block_size=4096,physical_block_size=512"),
         "physical_block_size"),
    )

    def test_each_is_one_line_and_status_1(self):
        rest = ("--disk", "disk,id=disk0", "--nbd", "nbd+unix:///?socket=m.sock",
                "--export", "disk0")
        for arguments, word in self.CASES:
            if arguments[-1] == "DISK":
                arguments = (*arguments[:-1], *rest)
            with self.subTest(arguments=" ".join(arguments)[:120]):
                daemon = self.daemon(*arguments, ready=False, own_ready=False)
                status, text = daemon.wait(20), daemon.errors.text()
                daemon.cleanup()
                self.assertEqual(status, 1, text)
                lines = [l for l in text.splitlines() if not l.startswith("Try 'minivmm")]
                self.assertEqual(len(lines), 1, text)
                self.assertIn(word, text)
                self.assertTrue(text.startswith("minivmm: "), text)
                self.assert_nothing_left()


if __name__ == "__main__":
    unittest.main(verbosity=2)
