# SPDX-License-Identifier: Apache-2.0
"""A stress job of the probe guest as seen from the host: what to type, what it made durable, and
whether the disk holds what it may have left."""

from . import stamp

SECTOR = stamp.SECTOR


class GuestStress:
    """Blocks of one sector in [offset, offset + length). `shared`: others write there too."""

    def __init__(self, seed, offset, length, writer=1, shared=False, max_blocks=48, depth=8):
        self.seed, self.offset, self.length = seed, offset, length
        self.writer, self.shared, self.max_blocks, self.depth = writer, shared, max_blocks, depth
        self.blocks = length // SECTOR

    def line(self, seconds):
        shared = " shared" if self.shared else ""
        return (f"stress seed={self.seed} seconds={seconds} offset={self.offset} "
                f"length={self.length} bs={SECTOR} max_blocks={self.max_blocks} "
                f"depth={self.depth} writer={self.writer} zeroes discards unmap log{shared}")

    def _request(self, sequence):
        return stamp.request(self.seed, self.blocks, self.max_blocks, True, True, sequence)

    @staticmethod
    def durable(lines):
        """Requests up to this number had been flushed, by the output of the guest."""
        out = 0
        for line in lines:
            if line.startswith("probe: flushed "):
                out = max(out, int(line.rsplit("sequence=", 1)[1]))
        return out

    def wrote(self, at, sector):
        """This job has written this sector there, at some time."""
        sequence = stamp.sequence_of(sector, at, self.writer, self.seed)
        if sequence is None:
            return False
        op, block, count = self._request(sequence)
        return op == stamp.WRITE and block <= (at - self.offset) // SECTOR < block + count

    def zeroed(self, last):
        """Offsets that requests up to `last` zeroed or discarded."""
        out = set()
        for sequence in range(1, last + 1):
            op, block, count = self._request(sequence)
            if op in (stamp.ZERO, stamp.DISCARD):
                out.update(range(self.offset + block * SECTOR,
                                 self.offset + (block + count) * SECTOR, SECTOR))
        return out

    def wrong(self, disk, before, durable, last=None, limit=5):
        """For a job alone in its range: what is wrong with `disk` (all of it; `before` is what it
        held when the job began). Requests up to `durable` are sure. `last`: the job's last
        request; None if it was cut off."""
        found = {}
        for block in range(self.blocks):
            at = self.offset + block * SECTOR
            sector = disk[at:at + SECTOR]
            if sector[:8] == stamp.MAGIC.to_bytes(8, "little") and sector != before[at:at + SECTOR]:
                found[block] = stamp.sequence_of(sector, at, self.writer, self.seed)
        if last is None:  # some more may have been under way
            last = max([durable] + [s for s in found.values() if s is not None]) + 16 * self.depth
        floor, wrote, cleared = self._history(durable, last)
        out = []
        for block in range(self.blocks):
            at = self.offset + block * SECTOR
            sector = disk[at:at + SECTOR]
            least = floor.get(block, 0)
            if sector == before[at:at + SECTOR] and least == 0:
                continue
            if sector == bytes(SECTOR) and cleared.get(block, -1) >= least:
                continue
            sequence = found.get(block)
            if sequence is not None and sequence >= least and sequence in wrote.get(block, ()):
                continue
            out.append(f"offset {at:#x}: request {sequence}, but at least {least} is sure; "
                       f"it begins {sector[:32].hex()}")
            if len(out) == limit:
                break
        return out

    def _history(self, durable, last):
        """By block: the last change that is sure, the writes, the last zeroing or discard."""
        floor, wrote, cleared = {}, {}, {}
        for sequence in range(1, last + 1):
            op, first, count = self._request(sequence)
            if op in (stamp.READ, stamp.FLUSH):
                continue
            for block in range(first, first + count):
                if op == stamp.WRITE:
                    wrote.setdefault(block, []).append(sequence)
                else:
                    cleared[block] = sequence
                if sequence <= durable and op != stamp.DISCARD:
                    floor[block] = sequence
        return floor, wrote, cleared
