#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Many clients that ask for much and take nothing: what they cost the server, that others are served
meanwhile, and that who takes his replies late gets the right ones.

With MINIVMM_SLOW=1 a thousand of them, with each kind of request by itself. What is measured is the
process's Pss: all that is resident on its account, the program's own pages and libraries too. The
disk's pages in the kernel's cache, which are mapped to be sent, are not: the kernel holds them
anyway, and takes them back when it wants to."""

import os
import re
import resource
import socket
import ssl
import struct
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.scene import MIB, SLOW, Scene, have

SANITIZED = os.environ.get("MINIVMM_SANITIZE", "") != ""  # it has memory of its own
KIB = 1 << 10
READ, WRITE = 0, 1
DEPTH = 16
SIZE = 16 * MIB
STARTTLS, GO, ACK = 5, 7, 1
LIMIT = 60.0


def request(kind, cookie, offset, length):
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, cookie, offset, length)


def reads(length):
    return b"".join(request(READ, i, i * length, length) for i in range(DEPTH))


# What a silent client says: much to read, little to read but often, and half of something to write.
KINDS = {
    "1 MiB reads": reads(MIB),
    "64 KiB reads": reads(64 * KIB) * 8,
    "half a 1 MiB write": request(WRITE, 1, 0, MIB) + bytes(MIB // 2),  # never done
}


class Talk:
    """A blocking client without a thread, in the clear or under TLS."""

    def __init__(self, address, tls=None):
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(LIMIT)
        self.socket.connect(address)
        self.exactly(18)
        self.socket.sendall(struct.pack(">I", 3))
        if tls:
            self.option(STARTTLS)
            self.socket = tls.wrap_socket(self.socket)
        self.option(GO, struct.pack(">IH", 0, 0))

    def exactly(self, length):
        out = bytearray(length)
        view = memoryview(out)
        while view:
            n = self.socket.recv_into(view)
            if n == 0:
                raise ConnectionResetError("the server closed the connection")
            view = view[n:]
        return bytes(out)

    def option(self, option, data=b""):
        self.socket.sendall(struct.pack(">8sII", b"IHAVEOPT", option, len(data)) + data)
        kind = 0
        while kind != ACK:
            _, _, kind, length = struct.unpack(">QIII", self.exactly(20))
            data = self.exactly(length)
            if kind & 0x80000000:
                raise OSError(f"the server refused option {option}: {data}")

    def say(self, data):
        """What of it the server takes, without waiting; `unsaid` is the rest."""
        self.socket.setblocking(False)
        try:
            while data:
                data = data[self.socket.send(data[:16 * KIB]):]
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        self.unsaid = data
        self.socket.settimeout(LIMIT)

    def reply(self, length):
        magic, error, cookie = struct.unpack(">IIQ", self.exactly(16))
        assert (magic, error) == (0x67446698, 0), (hex(magic), error)
        return cookie, self.exactly(length)

    def read(self, offset, length):
        self.socket.sendall(request(READ, 1, offset, length))
        return self.reply(length)[1]

    def close(self):
        self.socket.close()


class SilentClients(Scene):
    def setUp(self):
        super().setUp()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        self.content = self.random.randbytes(SIZE)
        with open(self.path("disk"), "wb") as file:
            file.write(self.content)
        self.tls = None

    def serve(self, listener):
        self.server = self.daemon("serve", "--disk", "disk,format=raw,id=disk", "--export",
                                  "disk,name=,writable", *listener)
        if self.address is None:
            _, line = self.server.errors.wait(lambda l: "NBD export at" in l)
            self.address = ("127.0.0.1", int(re.search(r"127\.0\.0\.1:(\d+)", line).group(1)))

    def serve_unix(self):
        self.address = self.path("socket")
        self.serve(["--nbd", f"nbd+unix:///?socket={self.address}"])

    def serve_tcp(self):
        self.address = None
        self.serve(["--nbd", "nbd://127.0.0.1:0"])

    def serve_tls(self):
        os.mkdir(self.path("pki"))

        def openssl(*words):
            subprocess.run(["openssl", *words], cwd=self.path("pki"), check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-keyout", "server-key.pem", "-out", "server-cert.pem", "-subj", "/CN=x", "-days", "2")
        os.link(self.path("pki/server-cert.pem"), self.path("pki/ca-cert.pem"))
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.tls.check_hostname = False
        self.tls.verify_mode = ssl.CERT_NONE
        self.address = None
        self.serve(["--object", f"tls-creds-x509,id=t,endpoint=server,dir={self.path('pki')},"
                    "verify-peer=off", "--nbd", "nbd://127.0.0.1:0,tls-creds=t"])

    def client(self):
        out = Talk(self.address, self.tls)
        self.addCleanup(out.close)
        return out

    def pss(self):
        """KiB."""
        total, counts = 0, True
        with open(f"/proc/{self.server.pid}/smaps", encoding="utf-8") as file:
            for line in file:
                if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                    counts = not line.endswith(f"{self.path('disk')}\n")
                elif counts and line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total

    def settled_pss(self):
        """What it is when it has not changed for half a second."""
        last, since = self.pss(), time.monotonic()
        while time.monotonic() - since < 0.5:
            time.sleep(0.05)
            now = self.pss()
            if abs(now - last) > 256:
                last, since = now, time.monotonic()
        return last

    def stall(self, count, said):
        """`count` clients, in turn of those that say one of `said`; most is what that took."""
        before = self.pss()
        clients = [self.client() for _ in range(count)]
        for i, client in enumerate(clients):
            client.say(said[i % len(said)])
        after = self.settled_pss()
        print(f"{count} clients: {before} KiB before, {after} KiB with them", flush=True)
        if not SANITIZED:
            self.assertLessEqual(after, 64 * KIB)
        return clients, after - before

    def given_back(self, before):
        """They have left, and with them the memory that they cost."""
        most = before + (40 if self.tls else 24) * KIB  # what TLS was made of stays on the heap
        limit = time.monotonic() + LIMIT
        while (now := self.pss()) > most and time.monotonic() < limit:
            time.sleep(0.05)
        print(f"{now} KiB when they have left", flush=True)
        if not SANITIZED:
            self.assertLessEqual(now, most)

    # Of the 48 MiB for all clients a part is set aside for each connection, so that with more of
    # them there is less for their requests.
    def bounded(self, count, most):
        before = self.pss()
        if SLOW:
            for what, said in KINDS.items():
                print(what, flush=True)
                clients, _ = self.stall(1000, [said])
                self.others_are_served(4 * KIB, 64 * KIB)
                for client in clients:
                    client.close()
                self.given_back(before)
        clients, more = self.stall(count, [KINDS["1 MiB reads"]])
        if not SANITIZED and not SLOW:  # then pools keep something of the earlier ones
            self.assertLessEqual(more, most)
        self.others_are_served(4 * KIB, 64 * KIB, MIB)
        for client in clients[:2] + clients[-2:]:
            self.late(client)
        for client in clients:
            client.close()
        self.given_back(before)

    def others_are_served(self, *lengths):
        """One request at a time, while the others do not read."""
        other = self.client()
        for length in lengths:
            for _ in range(20):
                offset = self.random.randrange(SIZE // 4096 - length // 4096 + 1) * 4096
                self.assertEqual(other.read(offset, length), self.content[offset:offset + length])

    def late(self, client):
        """Takes what it asked for after all; its replies gave up their memory meanwhile."""
        seen = set()
        for _ in range(DEPTH):
            cookie, data = client.reply(MIB)
            self.assertEqual(data, self.content[cookie * MIB:(cookie + 1) * MIB])
            seen.add(cookie)
        self.assertEqual(seen, set(range(DEPTH)))

    def test_over_unix(self):
        self.serve_unix()
        self.bounded(400, 44 * KIB)

    def test_over_tcp(self):
        self.serve_tcp()
        self.bounded(400, 44 * KIB)

    # They hold memory, each for its payload.
    def test_half_a_write(self):
        self.serve_unix()
        clients, _ = self.stall(24, [KINDS["half a 1 MiB write"]])
        self.others_are_served(4 * KIB, 64 * KIB)
        # What one announced is taken when it comes after all: nobody waits for its memory.
        data = self.random.randbytes(MIB // 2)
        clients[0].socket.sendall(clients[0].unsaid + data)
        self.assertEqual(clients[0].reply(0), (1, b""))
        self.content = bytes(MIB // 2) + data + self.content[MIB:]
        self.others_are_served(64 * KIB)
        # Now some do, and those that go on saying nothing may be cut; small requests need neither.
        self.stall(36, [KINDS["half a 1 MiB write"]])
        self.others_are_served(4 * KIB, 64 * KIB)

    @unittest.skipUnless(have("openssl"), "openssl is not installed")
    def test_over_tls(self):
        self.serve_tls()
        self.bounded(150, 46 * KIB)


if __name__ == "__main__":
    unittest.main(verbosity=2)
