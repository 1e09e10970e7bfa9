# SPDX-License-Identifier: Apache-2.0
"""A small NBD client: fixed newstyle, NBD_OPT_GO, simple replies. Any number of threads may share
one connection; each request then is in flight at the same time as the others'."""

import errno
import os
import socket
import struct
import threading

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST = 0x25609513
SIMPLE_REPLY = 0x67446698
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FLAG_FUA, FLAG_NO_HOLE = 1, 2

# The protocol's error numbers are Linux's but for these.
ERRORS = {1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC,
          75: errno.EOVERFLOW, 95: errno.ENOTSUP, 108: errno.ESHUTDOWN}


class NbdClient:
    def __init__(self, path=None, export="disk0", address=None, limit=30.0):
        if path is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            target = path
        else:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            target = address
        self._socket.settimeout(limit)
        try:
            self._socket.connect(target)
            self._negotiate(export)
        except BaseException:
            self._socket.close()
            raise
        self._limit = limit
        self._socket.settimeout(None)
        self._send_lock = threading.Lock()
        self._pending = {}
        self._pending_lock = threading.Lock()
        self._cookie = 0
        self._dead = None
        self._reader = threading.Thread(target=self._receive, daemon=True)
        self._reader.start()

    def _negotiate(self, export):
        magic, opt, flags = struct.unpack(">QQH", self._exactly(18))
        if magic != NBDMAGIC or opt != IHAVEOPT or not flags & 1:
            raise OSError(errno.EPROTO, "not a fixed newstyle NBD server")
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">I", 3) +
                             struct.pack(">QII", IHAVEOPT, OPT_GO, len(data)) + data)
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._exactly(20))
            if magic != REPLY_MAGIC:
                raise OSError(errno.EPROTO, "bad option reply")
            data = self._exactly(length)
            if kind == REP_ACK:
                return
            if kind == REP_INFO:
                if struct.unpack(">H", data[:2])[0] == 0:
                    self.size, self.flags = struct.unpack(">QH", data[2:12])
            elif kind & 0x80000000:
                raise OSError(errno.EPROTO, f"option refused: {kind:#x} {data[:200]!r}")

    def _exactly(self, length):
        parts = bytearray(length)
        view = memoryview(parts)
        got = 0
        while got < length:
            n = self._socket.recv_into(view[got:])
            if n == 0:
                raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
            got += n
        return bytes(parts)

    def _receive(self):
        try:
            while True:
                magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
                if magic != SIMPLE_REPLY:
                    raise OSError(errno.EPROTO, f"bad reply magic {magic:#x}")
                with self._pending_lock:
                    entry = self._pending.pop(cookie)
                if error == 0 and entry["read"]:
                    entry["data"] = self._exactly(entry["read"])
                entry["error"] = error
                entry["done"].set()
        except (OSError, ValueError, KeyError) as e:
            with self._pending_lock:
                self._dead = e
                waiting = list(self._pending.values())
                self._pending.clear()
            for entry in waiting:
                entry["lost"] = e
                entry["done"].set()

    def begin(self, command, offset=0, length=0, data=b"", flags=0):
        """Sends a request; finish() waits for its end."""
        entry = {"done": threading.Event(), "read": length if command == CMD_READ else 0}
        with self._pending_lock:
            if self._dead is not None:
                raise ConnectionResetError(errno.ECONNRESET, str(self._dead))
            self._cookie += 1
            cookie = self._cookie
            self._pending[cookie] = entry
        head = struct.pack(">IHHQQI", REQUEST, flags, command, cookie, offset, length)
        try:
            with self._send_lock:
                self._socket.sendall(head + data)
        except OSError as e:
            raise ConnectionResetError(errno.ECONNRESET, str(e)) from None
        return entry

    def finish(self, entry, limit=None):
        if not entry["done"].wait(limit or self._limit):
            raise TimeoutError(f"no NBD reply within {limit or self._limit} s")
        if "lost" in entry:
            raise ConnectionResetError(errno.ECONNRESET, str(entry["lost"]))
        if entry["error"]:
            number = ERRORS.get(entry["error"], errno.EIO)
            raise OSError(number, os.strerror(number))
        return entry.get("data")

    def read(self, offset, length):
        return self.finish(self.begin(CMD_READ, offset, length))

    def write(self, offset, data, fua=False):
        self.finish(self.begin(CMD_WRITE, offset, len(data), data, FLAG_FUA if fua else 0))

    def zero(self, offset, length, fua=False, no_hole=False):
        flags = (FLAG_FUA if fua else 0) | (FLAG_NO_HOLE if no_hole else 0)
        self.finish(self.begin(CMD_WRITE_ZEROES, offset, length, flags=flags))

    def trim(self, offset, length):
        self.finish(self.begin(CMD_TRIM, offset, length))

    def flush(self):
        self.finish(self.begin(CMD_FLUSH))

    def close(self):
        try:
            with self._send_lock:
                self._socket.sendall(struct.pack(">IHHQQI", REQUEST, 0, CMD_DISC, 0, 0, 0))
        except OSError:
            pass
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._reader.join(10)
        self._socket.close()
