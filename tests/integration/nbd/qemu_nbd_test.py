#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The program called as qemu-nbd beside the real one: the same arguments, and the same seen of it."""

import json
import os
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, run, wait_until

LIMIT = 20.0


@unittest.skipUnless(have("qemu-nbd", "qemu-io", "qemu-img", "nbdinfo"), "QEMU's tools are not there")
class QemuNbd(Scene):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("bin"))
        os.symlink(minivmm(), self.path("bin/qemu-nbd"))
        self.content = self.random.randbytes(MIB)
        with open(self.path("raw"), "wb") as f:
            f.write(self.content)
        for command in (("convert", "-f", "raw", "-O", "qcow2", "raw", "disk"),
                        ("snapshot", "-c", "before", "disk")):
            subprocess.run(["qemu-img", *command], cwd=self.dir, check=True)
        subprocess.run(["qemu-io", "-c", "write -P 9 0 64k", "disk"], cwd=self.dir, check=True,
                       stdout=subprocess.DEVNULL)
        self.socket = self.path("s")

    def programs(self):
        return (self.path("bin/qemu-nbd"), "qemu-nbd")

    def start(self, program, *arguments, socket=True):
        if os.path.exists(self.socket):
            os.unlink(self.socket)
        where = ["-k", self.socket] if socket else []
        server = subprocess.Popen([program, *where, *arguments], cwd=self.dir,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(self.end, server)
        wait_until(lambda: os.path.exists(self.socket) or server.poll() is not None, LIMIT,
                   "the socket is there")
        return server

    def end(self, server):
        server.kill()
        server.wait()

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.socket}"

    def connect(self, name="", limit=LIMIT):
        """A socket is there a moment before its server listens."""
        until = time.monotonic() + LIMIT
        while True:
            try:
                return NbdClient(self.socket, name, limit=limit)
            except ConnectionRefusedError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def read(self, name=""):
        """What a client reads first, as one connection."""
        client = self.connect(name)
        try:
            return client.size, client.read(0, 65536)
        finally:
            client.close()

    def both(self, look, *arguments):
        """What is seen of each program's server is the same; returns it."""
        seen = []
        for program in self.programs():
            server = self.start(program, *arguments)
            self.assertIsNone(server.poll(), "it has ended")
            seen.append(look())
            self.end(server)
        self.assertEqual(*seen)
        return seen[0]

    def info(self, name=""):
        out = json.loads(run(["nbdinfo", "--json", self.uri(name)])[1])["exports"][0]
        return {key: out.get(key) for key in ("export-name", "description", "export-size",
                                              "is_read_only", "can_multi_conn", "can_trim")}

    def test_what_clients_see(self):
        for arguments, name in ((("-t", "-f", "qcow2", "disk"), ""),
                                (("-t", "-r", "-f", "qcow2", "disk"), ""),
                                (("-t", "-f", "qcow2", "-x", "a b", "-D", "words", "disk"), "a%20b"),
                                (("-t", "-f", "raw", "-o", "4096", "raw"), ""),
                                (("-t", "-e", "3", "-r", "-f", "raw", "raw"), ""),
                                (("-t", "--image-opts",
                                  "driver=qcow2,file.driver=file,file.filename=disk"), "")):
            with self.subTest(arguments=arguments):
                seen = self.both(lambda n=name: self.info(n), *arguments)
                self.assertEqual(seen["is_read_only"], "-r" in arguments)

    def test_content(self):
        new = b"\x09" * 65536
        for arguments, wanted in ((("-f", "qcow2", "disk"), (MIB, new)),
                                  (("disk",), (MIB, new)),
                                  (("-n", "-f", "qcow2", "disk"), (MIB, new)),
                                  (("--cache=unsafe", "--aio=threads", "--discard=unmap",
                                    "--detect-zeroes=off", "-f", "qcow2", "disk"), (MIB, new)),
                                  (("-l", "before", "-f", "qcow2", "disk"),
                                   (MIB, self.content[:65536])),
                                  (("-l", "snapshot.name=before", "-f", "qcow2", "disk"),
                                   (MIB, self.content[:65536])),
                                  (("-o", "4096", "-f", "raw", "raw"),
                                   (MIB - 4096, self.content[4096:4096 + 65536]))):
            with self.subTest(arguments=arguments):
                self.assertEqual(self.both(self.read, *arguments), wanted)

    def test_it_ends_with_its_last_client(self):
        for program in self.programs():
            server = self.start(program, "-f", "raw", "-e", "2", "raw")
            one, two = self.connect(), self.connect()
            one.write(0, b"x" * 512)
            one.close()
            self.assertEqual(two.read(0, 512), b"x" * 512)
            time.sleep(0.2)
            self.assertIsNone(server.poll())
            two.close()
            self.assertEqual(server.wait(LIMIT), 0)
            self.assertFalse(os.path.exists(self.socket))

    def test_or_stays(self):
        for program in self.programs():
            server = self.start(program, "-t", "-f", "raw", "raw")
            self.read()
            self.read()
            self.assertIsNone(server.poll())
            server.send_signal(signal.SIGTERM)
            self.assertEqual(server.wait(LIMIT), 0)

    def test_so_many_clients_at_once(self):
        for program in self.programs():
            server = self.start(program, "-f", "raw", "-t", "raw")
            first = self.connect()
            with self.assertRaises(OSError):
                self.connect(limit=0.5)
            first.close()
            self.assertEqual(self.read()[0], MIB, "the next one is served")
            self.end(server)  # the image's locks are free for the other program

    def test_writes_to_a_snapshot_are_thrown_away(self):
        for program in self.programs():
            server = self.start(program, "-s", "-f", "qcow2", "disk")
            client = self.connect()
            client.write(0, b"y" * 65536)
            client.flush()
            self.assertEqual(client.read(0, 65536), b"y" * 65536)
            client.close()
            self.assertEqual(server.wait(LIMIT), 0)
            server = self.start(program, "-f", "qcow2", "disk")
            self.assertEqual(self.read()[1], b"\x09" * 65536)
            self.assertEqual(server.wait(LIMIT), 0)

    def is_over(self, pid):
        try:
            with open(f"/proc/{pid}/status", encoding="utf-8") as f:
                return "(zombie)" in f.read()
        except (FileNotFoundError, ProcessLookupError):
            return True

    def test_in_the_background(self):
        for program in self.programs():
            pid_file = self.path("pid")
            if os.path.exists(self.socket):
                os.unlink(self.socket)
            # Its output ends when it serves: nobody waits for the server's.
            status, text = run([program, "--fork", f"--pid-file={pid_file}", "-k", self.socket, "-f",
                                "raw", self.path("raw")], LIMIT)
            self.assertEqual((status, text), (0, ""))
            with open(pid_file, encoding="utf-8") as f:
                pid = int(f.read())
            os.kill(pid, 0)
            self.read()
            wait_until(lambda p=pid: self.is_over(p), LIMIT, "it has ended")
            status, text = run([program, "--fork", "-k", self.socket, "-f", "raw",
                                self.path("nosuch")], LIMIT)
            self.assertEqual(status, 1)
            self.assertIn("No such file", text)

    def test_list(self):
        listed = []
        self.start("qemu-nbd", "-t", "-r", "-x", "foo", "-D", "text", "-f", "qcow2", "disk")
        for program in self.programs():
            status, text = run([program, "-L", "-k", self.socket])
            self.assertEqual(status, 0, text)
            listed.append(text)
        self.assertEqual(*listed)
        self.assertIn("export: 'foo'", listed[0])

    def test_what_is_refused(self):
        for arguments in ((), ("a", "b"), ("--nope",), ("-f", "nosuch", "disk"), ("nosuch",),
                          ("-e", "x", "disk"), ("--cache=nosuch", "disk"), ("--aio=nosuch", "disk"),
                          ("--discard=nosuch", "disk"), ("-k", "relative", "disk"),
                          ("-L", "disk"),
                          ("-L", "-k", self.path("nobody")), ("-o", "x", "disk"),
                          ("--image-opts", "-f", "raw", "disk"), ("-l", "nosuch", "disk"),
                          ("--tls-creds=none", "disk")):
            for program in self.programs():
                status, text = run([program, *arguments], LIMIT, cwd=self.dir)
                self.assertEqual(status, 1, f"{arguments}: {text}")

    def test_sockets_that_are_handed_over(self):
        for program in self.programs():
            script = ("import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]);"
                      "s.listen(); os.dup2(s.fileno(), 3); os.set_inheritable(3, True);"
                      "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
                      "os.execvp(sys.argv[2], sys.argv[2:])")
            if os.path.exists(self.socket):
                os.unlink(self.socket)
            server = subprocess.Popen([sys.executable, "-c", script, self.socket, program, "-f",
                                       "raw", "raw"], cwd=self.dir, stderr=subprocess.DEVNULL)
            self.addCleanup(server.wait)
            self.addCleanup(server.kill)
            wait_until(lambda: os.path.exists(self.socket), LIMIT, "it listens")
            time.sleep(0.1)
            self.assertEqual(self.read()[0], MIB)
            self.assertEqual(server.wait(LIMIT), 0)


if __name__ == "__main__":
    unittest.main()
