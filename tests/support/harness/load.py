# SPDX-License-Identifier: Apache-2.0
"""Host threads that write, zero, discard, flush and read a disk at random, each in a range of its
own and in one that all share, and tell a Model of it."""

import random
import threading

from .model import BLOCK, ZERO, content


class Writer(threading.Thread):
    """`own` and `shared` are (begin, end). Nobody else changes `own`, so reads there are exact."""

    def __init__(self, load, disk, own, shared, seed):
        super().__init__(daemon=True)
        self.load, self.disk, self.own, self.shared = load, disk, own, shared
        self.model = load.model
        self.random = random.Random(seed)
        self.mirror = bytearray(self.model.initial[own[0]:own[1]])

    def run(self):
        try:
            while not self.load.stopping.is_set():
                self._step()
        except TimeoutError as e:
            self.load.fail(f"{type(self.disk).__name__}: {e}")
        except OSError as e:
            # A process that was killed answers no more; anything else is a failure.
            if not self.load.killed.wait(2):
                self.load.fail(f"{type(self.disk).__name__}: {e!r}")
        except Exception as e:  # pylint: disable=broad-except
            self.load.fail(f"{type(self.disk).__name__}: {e!r}")

    def _range(self):
        begin, end = self.own if self.random.random() < 0.65 else self.shared
        blocks = self.random.choice((1, 2, 3, 8, 9, 16, 40, 130))
        blocks = min(blocks, (end - begin) // BLOCK)
        offset = begin + self.random.randrange((end - begin) // BLOCK - blocks + 1) * BLOCK
        return offset, blocks * BLOCK

    def _step(self):
        offset, length = self._range()
        kind = self.random.randrange(100)
        if kind < 55:
            self._write(offset, length, fua=kind < 6)
        elif kind < 66:
            self._zero(offset, length, fua=kind == 55)
        elif kind < 74 and hasattr(self.disk, "trim"):
            self._discard(offset, length)
        elif kind < 79:
            began = self.model.now()
            self.disk.flush()
            self.model.flushed(began)
        else:
            self._read(offset, length)
        self.load.requests += 1

    def _mine(self, offset):
        return self.own[0] <= offset < self.own[1]

    def _remember(self, offset, data):
        if self._mine(offset):
            self.mirror[offset - self.own[0]:offset - self.own[0] + len(data)] = data

    def _write(self, offset, length, fua):
        value = self.model.new_value()
        data = content(value, offset, length)
        op = self.model.begin(offset, length, value, fua=fua)
        self.disk.write(offset, data, fua=fua)
        self.model.end(op)
        self._remember(offset, data)

    def _zero(self, offset, length, fua):
        op = self.model.begin(offset, length, ZERO, fua=fua)
        self.disk.zero(offset, length, fua=fua, no_hole=self.random.random() < 0.3)
        self.model.end(op)
        self._remember(offset, bytes(length))

    def _discard(self, offset, length):
        op = self.model.begin(offset, length, ZERO, discard=True)
        self.disk.trim(offset, length)
        self.model.end(op)
        if not self._mine(offset):
            return
        # Each block is gone or as it was.
        now = self.disk.read(offset, length)
        at = offset - self.own[0]
        for i in range(0, length, BLOCK):
            block = now[i:i + BLOCK]
            if block not in (bytes(BLOCK), self.mirror[at + i:at + i + BLOCK]):
                raise AssertionError(f"after a discard {offset + i:#x} holds {block[:16].hex()}")
        self._remember(offset, now)

    def _read(self, offset, length):
        data = self.disk.read(offset, length)
        if not self._mine(offset):
            return
        at = offset - self.own[0]
        wanted = self.mirror[at:at + length]
        if data != wanted:
            bad = next(i for i in range(0, length, BLOCK)
                       if data[i:i + BLOCK] != wanted[i:i + BLOCK])
            raise AssertionError(f"{offset + bad:#x} reads {data[bad:bad + 32].hex()}, not "
                                 f"{wanted[bad:bad + 32].hex()}")


class Load:
    def __init__(self, model):
        self.model = model
        self.stopping = threading.Event()
        self.killed = threading.Event()
        self.failures = []
        self.requests = 0
        self._writers = []

    def fail(self, text):
        self.failures.append(text)
        self.stopping.set()

    def add(self, disk, own, shared, seed):
        self._writers.append(Writer(self, disk, own, shared, seed))

    def start(self):
        for writer in self._writers:
            writer.start()

    def stop(self, killed=False, limit=60):
        """Ends all threads; adds to `failures` those that hang."""
        if killed:
            self.killed.set()
        self.stopping.set()
        for writer in self._writers:
            writer.join(limit)
            if writer.is_alive():
                self.failures.append(f"{type(writer.disk).__name__}: a request hangs")
