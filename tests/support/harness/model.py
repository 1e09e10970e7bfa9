# SPDX-License-Identifier: Apache-2.0
"""What a disk may hold after concurrent writers: every 512-byte block has the changes that were
made to it, with when each began and ended, and when flushes did. From any thread."""

import itertools
import struct

BLOCK = 512
MAGIC = 0x6B636F6C62747364
ZERO = 0  # the value of a block of zeroes


def content(value, offset, length):
    """Blocks that carry a value and where they belong."""
    return b"".join(struct.pack("<QQQQ", MAGIC, value, at, ~value & 0xFFFFFFFFFFFFFFFF) * 16
                    for at in range(offset, offset + length, BLOCK))


def value_of(block, offset):
    """The value that a block carries; None if it is torn, misplaced or somebody else's."""
    if block == bytes(BLOCK):
        return ZERO
    magic, value, where, _ = struct.unpack_from("<QQQQ", block)
    if magic != MAGIC or where != offset or block != content(value, offset, BLOCK):
        return None
    return value


class Op:
    """A change. `ended` is None if it was under way, or failed, when everything stopped."""
    __slots__ = ("began", "ended", "offset", "length", "value", "discard", "fua")

    def __init__(self, began, offset, length, value, discard, fua):
        self.began, self.ended = began, None
        self.offset, self.length = offset, length
        self.value, self.discard, self.fua = value, discard, fua


class Model:
    def __init__(self, initial, values=None):
        """`initial`: the bytes of the disk before. `values`: counts up, across models."""
        self.initial = initial
        self._clock = itertools.count(1)
        self._values = values or itertools.count(1 << 32)
        self._ops = []
        self._flushed = 0  # a flush that has returned was sent then

    def now(self):
        return next(self._clock)

    def new_value(self):
        return next(self._values)

    def begin(self, offset, length, value, discard=False, fua=False):
        op = Op(self.now(), offset, length, value, discard, fua)
        self._ops.append(op)
        return op

    def end(self, op):
        op.ended = self.now()

    def flushed(self, began):
        """A flush has returned; `began` is now() from before it was sent."""
        self._flushed = max(self._flushed, began)

    def counts(self):
        ops = list(self._ops)
        durable = sum(self._durable(op, True) for op in ops)
        return f"{len(ops)} changes, {durable} of them flushed"

    def wrong(self, data, start, crashed, explained=None, limit=5):
        """The first things that are wrong with `data`, which lies at `start`: a text each. After a
        crash what was not flushed may be missing; otherwise everything that ended is there.
        `explained(offset, block)`: true if somebody else may have written it."""
        touched = {}
        for op in list(self._ops):
            for at in range(op.offset, op.offset + op.length, BLOCK):
                touched.setdefault(at, []).append(op)
        out = []
        for at in range(start, start + len(data), BLOCK):
            block = data[at - start:at - start + BLOCK]
            problem = self._problem(at, block, touched.get(at, ()), crashed)
            if problem is None or (explained is not None and explained(at, block)):
                continue
            out.append(f"offset {at:#x}: {problem}; it begins {block[:32].hex()}")
            if len(out) == limit:
                break
        return out

    def _durable(self, op, crashed):
        if op.ended is None:
            return False
        return not crashed or op.fua or op.ended < self._flushed

    def _problem(self, at, block, ops, crashed):
        # What ended before a change began that is sure to be there must not be seen any more. A
        # discard makes nothing sure: what it covers may stay.
        floor = max((op.began for op in ops if not op.discard and self._durable(op, crashed)),
                    default=0)
        if block == self.initial[at:at + BLOCK]:
            if floor == 0:
                return None
        found = value_of(block, at)
        if found is None:
            return "a torn or foreign block"
        seen = [op for op in ops if op.value == found]
        if any(op.ended is None or op.ended >= floor for op in seen):
            return None
        last = max(ops, key=lambda op: op.began, default=None)
        latest = f"the last change was {last.value:#x} at {last.began}" if last else "never changed"
        if not seen:
            return f"value {found:#x}, which nobody wrote here; {latest}"
        return (f"value {found:#x} is old, its write took "
                f"{[(o.began, o.ended) for o in seen]}; one that is sure began at {floor}; {latest}")
