# SPDX-License-Identifier: Apache-2.0
"""The probe guest's stamped sectors and the plan of its stress job: images/probe/stamp.h and
stress_plan.h, read from outside."""

import struct

SECTOR = 512
MAGIC = 0x31504D415453564D
MASK = 0xFFFFFFFFFFFFFFFF

WRITE, READ, FLUSH, ZERO, DISCARD = range(5)


def mix64(v):
    v = (v + 0x9E3779B97F4A7C15) & MASK
    v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & MASK
    return v ^ (v >> 31)


def make(offset, sequence, writer, seed):
    """The 512 bytes of a stamp."""
    words = [MAGIC, offset, sequence, (seed & 0xFFFFFFFF) << 32 | writer]
    filler = mix64(offset ^ mix64(sequence ^ mix64(words[3])))
    for _ in range(59):
        filler = (filler * 0xD1342543DE82EF95 + 1) & MASK
        words.append(filler)
    check = 0
    for i, word in enumerate(words):
        check += (word << i | word >> (64 - i)) & MASK if i else word
    words.append(check & MASK)
    return struct.pack("<64Q", *words)


def sequence_of(sector, offset, writer, seed):
    """The request that wrote this sector; None if it is no whole stamp of that writer here."""
    magic, where, sequence = struct.unpack_from("<3Q", sector)
    if magic != MAGIC or where != offset:
        return None
    return sequence if sector == make(offset, sequence, writer, seed) else None


def request(seed, blocks, max_blocks, zeroes, discards, sequence):
    """(operation, first block, blocks) of a stress job's request, counted from 1."""
    where = mix64(seed ^ mix64(sequence))
    what = mix64(where)
    count = (what >> 8) % min(max_blocks, blocks) + 1
    kind = what & 63
    op = WRITE
    if kind == 0:
        op = FLUSH
    elif kind <= 16:
        op = READ
    elif kind <= 20 and zeroes:
        op = ZERO
    elif 21 <= kind <= 23 and discards:
        op = DISCARD
    return op, where % (blocks - count + 1), count
