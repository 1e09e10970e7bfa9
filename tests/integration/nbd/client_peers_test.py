#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The node `nbd` with other programs' servers: nbdkit behind its filters, and nbd-server. A server of
ours stands before the node, so that what a client sees of it went through all of it."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, run, wait_until

LIMIT = 20.0
EXTENT_FLAGS = {"data": 0, "zero": 3}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Peer(Scene):
    """`far` is the other's server, `near` ours."""

    def setUp(self):
        super().setUp()
        self.far = self.path("far")
        self.near = self.path("near")
        self.content = self.random.randbytes(MIB) + bytes(MIB)
        with open(self.path("file"), "wb") as f:
            f.write(self.content)
        self.scenes = 0

    def anew(self):
        """Nobody is there any more, and the next ones are somewhere else."""
        self.scenes += 1
        for each in self._daemons:
            each.cleanup()
        self._daemons.clear()
        self.far = self.path(f"far{self.scenes}")
        self.near = self.path(f"near{self.scenes}")

    def start_far(self, *command, wait=True):
        server = subprocess.Popen(command, cwd=self.dir, stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        if wait:
            wait_until(lambda: os.path.exists(self.far) or server.poll() is not None, LIMIT,
                       "the server is there")
            self.assertIsNone(server.poll(), f"{command} has ended")
        return server

    def nbdkit(self, *arguments, plugin=("file", "file")):
        return self.start_far("nbdkit", "-f", "-U", self.far, *arguments[:self.options(arguments)],
                              *plugin, *arguments[self.options(arguments):])

    @staticmethod
    def options(arguments):
        """Those of nbdkit stand before the plugin, filters' parameters behind it."""
        return next((i for i, word in enumerate(arguments) if not word.startswith("-")),
                    len(arguments))

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.far}"

    def node(self, keys="", name=""):
        return f"driver=nbd,node-name=far,uri={self.uri(name)}{keys}"

    def start_near(self, keys="", writable=True, io_threads=1, name=""):
        return self.daemon("serve", "--io-threads", io_threads, "--blockdev", self.node(keys, name),
                           "--export", "far,writable" if writable else "far",
                           "--nbd", f"nbd+unix:///?socket={self.near}")

    def client(self):
        client = NbdClient(self.near, "far", limit=LIMIT)
        self.addCleanup(client.close)
        return client

    def behind(self):
        with open(self.path("file"), "rb") as f:
            return f.read()

    def extents(self, uri=None):
        """[(offset, length, kind)] by nbdinfo."""
        status, text = run(["nbdinfo", "--map", uri or f"nbd+unix:///far?socket={self.near}"])
        self.assertEqual(status, 0, text)
        return [(int(w[0]), int(w[1]), int(w[2])) for w in map(str.split, text.splitlines())]

    def refused_with(self, error, body):
        with self.assertRaises(OSError) as caught:
            body()
        self.assertEqual(caught.exception.errno, error)

    def exercise(self, client):
        """Reads, writes, zeroes and trims of every alignment, beside a model."""
        model = bytearray(self.content)
        for _ in range(40):
            offset = self.random.randrange(len(model))
            length = min(self.random.choice((1, 511, 512, 4096, 70_000)), len(model) - offset)
            kind = self.random.randrange(4)
            if kind == 0:
                data = self.random.randbytes(length)
                client.write(offset, data, fua=self.random.random() < 0.3)
                model[offset:offset + length] = data
            elif kind == 1:
                client.zero(offset, length, no_hole=self.random.random() < 0.5)
                model[offset:offset + length] = bytes(length)
            elif kind == 2:
                client.flush()
            self.assertEqual(client.read(offset, length), model[offset:offset + length])
        client.flush()
        self.assertEqual(self.behind(), bytes(model))


@unittest.skipUnless(have("nbdkit", "nbdinfo"), "nbdkit is not installed")
class Nbdkit(Peer):
    def test_abilities_that_a_server_does_not_have(self):
        for arguments in ((), ("--no-sr",), ("--filter=nozero",),
                          ("--filter=noextents",), ("--filter=fua", "fuamode=discard"),
                          ("--filter=fua", "fuamode=emulate"), ("--filter=fua", "fuamode=native"),
                          ("--filter=fua", "fuamode=force"),
                          ("--filter=nozero", "zeromode=emulate"),
                          ("--filter=multi-conn", "multi-conn-mode=disable"),
                          ("--filter=multi-conn", "multi-conn-mode=emulate"),
                          ("--filter=noparallel", "serialize=requests"),
                          ("--filter=nozero", "--filter=noextents", "--filter=fua", "--no-sr",
                           "fuamode=emulate"),
                          ("--filter=blocksize-policy", "blocksize-minimum=4096",
                           "blocksize-preferred=8192", "blocksize-maximum=65536",
                           "blocksize-error-policy=error"),
                          ("--filter=limit", "limit=1")):
            with self.subTest(arguments=arguments):
                self.anew()
                with open(self.path("file"), "wb") as f:
                    f.write(self.content)
                server = self.nbdkit(*arguments)
                near = self.start_near(",connections=4", io_threads=2)
                self.exercise(self.client())
                self.assertEqual(near.stop(), 0, near.errors.text())
                server.terminate()
                self.assertEqual(server.wait(LIMIT), 0)

    def test_extents_are_passed_on_or_all_is_data(self):
        whole = [(0, MIB, EXTENT_FLAGS["data"]), (MIB, MIB, EXTENT_FLAGS["zero"])]
        for arguments, expected in (((), whole),
                                    (("--filter=noextents",), [(0, 2 * MIB, EXTENT_FLAGS["data"])]),
                                    (("--no-sr",), [(0, 2 * MIB, EXTENT_FLAGS["data"])])):
            with self.subTest(arguments=arguments):
                self.anew()
                server = self.nbdkit(*arguments, plugin=("data", "data= @0 <file[:1048576] @2097152"))
                near = self.start_near(writable=True)
                self.assertEqual(self.extents(), expected)
                self.assertEqual(self.client().read(0, 2 * MIB), self.content)
                self.assertEqual(near.stop(), 0)
                server.terminate()
                server.wait(LIMIT)

    def test_delays_are_side_by_side(self):
        self.nbdkit("--filter=delay", "delay-read=300ms", "delay-write=300ms")
        self.start_near()
        client = self.client()
        begin = time.monotonic()
        reads = [client.begin(0, i * 4096, 4096) for i in range(12)]
        for i, each in enumerate(reads):
            self.assertEqual(client.finish(each), self.content[i * 4096:(i + 1) * 4096])
        took = time.monotonic() - begin
        self.assertGreaterEqual(took, 0.25)
        self.assertLess(took, 12 * 0.3)

    def test_errors_are_those_of_the_request(self):
        self.nbdkit("--filter=error", "error-pwrite=ENOSPC", "error-pwrite-rate=100%",
                    "error-trim=EIO", "error-trim-rate=100%", "error-zero=EPERM",
                    "error-zero-rate=100%", "error-file=broken")
        self.start_near()
        client = self.client()
        client.write(0, b"before")
        open(self.path("broken"), "wb").close()
        self.refused_with(errno.ENOSPC, lambda: client.write(0, b"x" * 512))
        self.refused_with(errno.EIO, lambda: client.trim(0, 4096))
        self.refused_with(errno.EPERM, lambda: client.zero(0, 4096))
        # Others go on, and it does when the reason is gone.
        self.assertEqual(client.read(0, 6), b"before")
        client.flush()
        os.unlink(self.path("broken"))
        client.write(0, b"behind")
        self.assertEqual(client.read(0, 6), b"behind")

    def test_errors_now_and_then(self):
        self.nbdkit("--filter=error", "error=EIO", "error-pread-rate=30%", "error-pwrite-rate=30%")
        near = self.start_near(",reconnect-delay=5", io_threads=2)
        client = self.client()
        model = bytearray(self.content)
        seen = {True: 0, False: 0}
        for i in range(120):
            offset = (i % 16) * 4096
            data = self.random.randbytes(4096)
            good = True
            try:
                client.write(offset, data)
                model[offset:offset + 4096] = data
            except OSError as e:
                self.assertEqual(e.errno, errno.EIO)
                good = False
            seen[good] += 1
            try:
                self.assertEqual(client.read(offset, 4096), model[offset:offset + 4096])
            except OSError as e:
                self.assertEqual(e.errno, errno.EIO)
        self.assertGreater(seen[True], 40)
        self.assertGreater(seen[False], 10)
        # An error is an answer: no connection was given up for it.
        near.send(signal.SIGUSR1)
        near.errors.wait(lambda line: "far" in line)
        self.assertNotIn("closed the connection", "\n".join(near.errors.lines))

    def test_a_server_that_retries_keeps_the_request(self):
        self.nbdkit("--filter=retry", "--filter=error", "error=EIO", "error-rate=100%",
                    "error-file=broken", "retries=20", "retry-delay=1", "retry-exponential=no")
        self.start_near()
        client = self.client()
        open(self.path("broken"), "wb").close()
        pending = client.begin(0, 0, 4096)
        time.sleep(0.5)
        self.assertFalse(pending["done"].is_set())
        os.unlink(self.path("broken"))
        self.assertEqual(client.finish(pending), self.content[:4096])

    def test_a_server_that_ends_with_its_last_client(self):
        server = self.nbdkit("--filter=exitlast")
        near = self.start_near(",connections=2", io_threads=2)
        self.assertEqual(self.client().read(0, 512), self.content[:512])
        self.assertIsNone(server.poll())
        self.assertEqual(near.stop(), 0)
        self.assertEqual(server.wait(LIMIT), 0)

    def test_a_server_of_the_oldstyle_can_be_read(self):
        self.nbdkit("--oldstyle", "-r")
        self.start_near(",read-only=on", writable=False)
        self.assertEqual(self.client().read(0, 2 * MIB), self.content)
        self.assertEqual(run([minivmm(), "nbd", "info", self.uri()]),
                         run(["nbdinfo", "--no-content", self.uri()]))
        self.assertEqual(json.loads(run([minivmm(), "nbd", "info", "--json", self.uri()])[1]),
                         json.loads(run(["nbdinfo", "--no-content", "--json", self.uri()])[1]))
        status, text = run([minivmm(), "nbd", "list", self.uri()])
        self.assertEqual(status, 1)
        self.assertIn("oldstyle", text)

    def test_a_server_that_takes_one_client(self):
        self.nbdkit("--filter=limit", "limit=1")
        self.start_near(",connections=4", io_threads=2)
        client = self.client()
        for i in range(50):
            self.assertEqual(client.read(i * 512, 512), self.content[i * 512:(i + 1) * 512])

    def test_read_only(self):
        self.nbdkit("-r")
        text = self.refused("serve", "--blockdev", self.node(), "--export", "far", "--nbd",
                            f"nbd+unix:///?socket={self.near}")
        self.assertIn("read-only=on", text)
        self.start_near(",read-only=on", writable=False)
        client = self.client()
        self.assertEqual(client.read(0, 4096), self.content[:4096])
        self.refused_with(errno.EPERM, lambda: client.write(0, b"x" * 512))

    def pause(self, word):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(self.path("control"))
            control.sendall(word)
            self.assertEqual(control.recv(1), word.upper())

    def test_a_server_that_hangs_for_seconds(self):
        self.nbdkit("--filter=pause", f"pause-control={self.path('control')}")
        # One node waits for it however long, the other for a second.
        self.start_near()
        other = self.path("other")
        self.daemon("serve", "--blockdev", self.node(",request-timeout=1"), "--export", "far",
                    "--nbd", f"nbd+unix:///?socket={other}", "--blockdev",
                    "driver=memory,node-name=here,size=1M", "--export", "here")
        patient = self.client()
        hasty = NbdClient(other, "far", limit=LIMIT)
        self.addCleanup(hasty.close)
        here = NbdClient(other, "here", limit=LIMIT)
        self.addCleanup(here.close)
        hasty.read(0, 512)
        self.pause(b"p")
        pending = patient.begin(0, 0, 4096)
        begin = time.monotonic()
        self.refused_with(errno.EIO, lambda: hasty.read(0, 4096))
        self.assertGreater(time.monotonic() - begin, 0.9)
        self.assertLess(time.monotonic() - begin, 8)
        # Who uses something else notices nothing.
        self.assertEqual(here.read(0, 512), bytes(512))
        self.assertFalse(pending["done"].is_set())
        self.pause(b"r")
        self.assertEqual(patient.finish(pending), self.content[:4096])

        def works_again():
            try:
                return hasty.read(0, 512) == self.content[:512]
            except OSError:
                return False
        wait_until(works_again, LIMIT, "it works again")

    def test_a_server_that_is_killed_under_load(self):
        """Its file stays as it was written: what is sent again changes nothing, and nothing is lost."""
        command = ("nbdkit", "-f", "-U", self.far, "file", "file")
        server = self.start_far(*command)
        self.start_near(",reconnect-delay=60,connections=2", io_threads=2)
        rounds = [0] * 4
        stop = threading.Event()
        problems = []

        def write(which):
            client = NbdClient(self.near, "far", limit=60)
            try:
                while not stop.is_set():
                    number = rounds[which] + 1
                    data = number.to_bytes(8, "big") * 512
                    client.write(which * 65536, data)
                    rounds[which] = number
                    if client.read(which * 65536, 4096) != data:
                        problems.append(f"{which}: round {number} is not there")
                    if number % 20 == 0:
                        client.flush()
            except OSError as e:
                problems.append(f"{which}: {e}")
            finally:
                client.close()
        writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
        for each in writers:
            each.start()
        for _ in range(4):
            before = list(rounds)
            wait_until(lambda b=before: problems or all(r > o for r, o in zip(rounds, b)), 60,
                       "every writer gets on")
            server.kill()
            server.wait()
            os.unlink(self.far)
            time.sleep(0.1)
            server = self.start_far(*command)
        before = list(rounds)
        wait_until(lambda: problems or all(r > o for r, o in zip(rounds, before)), 60,
                   "every writer gets on")
        stop.set()
        for each in writers:
            each.join()
        self.assertEqual(problems, [])
        for which, number in enumerate(rounds):
            self.assertEqual(self.behind()[which * 65536:which * 65536 + 4096],
                             number.to_bytes(8, "big") * 512)


class OurOwn(Peer):
    def test_a_killed_server_of_an_image_loses_nothing_that_was_acknowledged(self):
        """A qcow2 image's tables are in the server's memory until a flush: kill -9 loses them. The
        client's node has what was not flushed, and does it again."""
        size = 8 * MIB
        self.create("image", size, "-f", "qcow2")

        def serve():
            if os.path.exists(self.far):
                os.unlink(self.far)
            return self.daemon("serve", "--disk", "image,id=d", "--export", "d,writable", "--nbd",
                               f"nbd+unix:///?socket={self.far}")
        far = serve()
        near = self.start_near(",reconnect-delay=60", name="d")
        client = self.client()
        model = bytearray(size)
        for _ in range(4):
            for _ in range(60):
                offset = self.random.randrange(size // 512) * 512
                length = min(self.random.choice((512, 4096, 65536, 200_704)), size - offset)
                kind = self.random.randrange(12)
                if kind < 8:
                    data = self.random.randbytes(length)
                    client.write(offset, data, fua=kind == 0)
                    model[offset:offset + length] = data
                elif kind < 11:
                    client.zero(offset, length)
                    model[offset:offset + length] = bytes(length)
                else:
                    client.flush()
            far.kill()
            far = serve()
            offset = self.random.randrange(size - 65536)
            self.assertEqual(client.read(offset, 65536), model[offset:offset + 65536])
        client.flush()
        far.kill()
        self.check("image", leaks_allowed=True)
        far = serve()
        self.assertEqual(client.read(0, size), bytes(model))
        client.close()
        self.assertEqual(near.stop(), 0, near.errors.text())
        self.assertEqual(far.stop(), 0)
        self.tool("convert", "-O", "raw", self.path("image"), self.path("raw"))
        with open(self.path("raw"), "rb") as f:
            self.assertEqual(f.read(), bytes(model))


@unittest.skipUnless(have("nbd-server"), "nbd-server is not installed")
class ReferenceServer(Peer):
    """Without structured replies, without extents, with a thread of its own for each client."""

    def start_reference(self, *lines):
        with open(self.path("config"), "w", encoding="ascii") as f:
            f.write(f"[generic]\nunixsock = {self.far}\nport = {free_port()}\nlistenaddr = 127.0.0.1\n"
                    f"allowlist = true\n[disk]\nexportname = {self.path('file')}\n" +
                    "".join(f"{line}\n" for line in lines))
        # In the background: in the foreground it serves one client.
        subprocess.run(["nbd-server", "-C", self.path("config"), "-p", self.path("pid")], check=True,
                       stderr=subprocess.DEVNULL)
        wait_until(lambda: os.path.exists(self.path("pid")) and os.path.getsize(self.path("pid")),
                   LIMIT, "the server is there")
        with open(self.path("pid"), encoding="ascii") as f:
            self.addCleanup(os.kill, int(f.read()), signal.SIGTERM)

    @unittest.skipUnless(have("nbd-client"), "nbd-client is not installed")
    def test_both_list_the_same(self):
        self.start_reference()
        status, text = run(["nbd-client", "-l", "-unix", self.far])
        self.assertEqual(status, 0, text)
        self.assertEqual(run([minivmm(), "nbd", "list", self.uri()]),
                         (0, text.replace("Negotiation: ..", "").lstrip("\n")))

    def test_reads_and_writes(self):
        self.start_reference("flush = true", "fua = true", "trim = true")
        near = self.start_near(name="disk")
        self.exercise(self.client())
        self.assertEqual(near.stop(), 0)
        status, text = run([minivmm(), "nbd", "list", self.uri()])
        self.assertEqual((status, text), (0, "disk\n"))
        status, text = run([minivmm(), "image", "compare", "-f", "raw", "-F", "raw", self.uri("disk"),
                            self.path("file")])
        self.assertEqual(status, 0, text)
        self.assertIn("identical", text)

    def test_read_only(self):
        self.start_reference("readonly = true")
        self.start_near(",read-only=on", writable=False, name="disk")
        self.assertEqual(self.client().read(0, 4096), self.content[:4096])


if __name__ == "__main__":
    unittest.main()
