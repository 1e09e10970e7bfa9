#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the models of the daemon tests must notice: without this, a test that checks nothing would
pass as well."""

import os
import sys
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness import stamp
from harness.guest_stress import GuestStress
from harness.model import BLOCK, ZERO, Model, content

SIZE = 8 * BLOCK


class ModelTest(unittest.TestCase):
    def setUp(self):
        self.initial = content(1, 0, SIZE)
        self.model = Model(self.initial)

    def write(self, offset, length, value=None, done=True, discard=False, fua=False):
        value = self.model.new_value() if value is None else value
        op = self.model.begin(offset, length, value, discard=discard, fua=fua)
        if done:
            self.model.end(op)
        return value

    def disk(self, *parts):
        out = bytearray(self.initial)
        for offset, data in parts:
            out[offset:offset + len(data)] = data
        return bytes(out)

    def assert_right(self, data, crashed=False):
        self.assertEqual(self.model.wrong(data, 0, crashed), [])

    def assert_wrong(self, data, crashed=False):
        self.assertNotEqual(self.model.wrong(data, 0, crashed), [])

    def test_a_completed_write_is_there(self):
        value = self.write(BLOCK, BLOCK)
        self.assert_right(self.disk((BLOCK, content(value, BLOCK, BLOCK))))
        self.assert_wrong(self.initial)

    def test_a_later_write_hides_an_earlier_one(self):
        first = self.write(0, BLOCK)
        self.write(0, BLOCK)
        self.assert_wrong(self.disk((0, content(first, 0, BLOCK))))

    def test_of_overlapping_writes_either_may_win(self):
        one = self.model.begin(0, BLOCK, 100)
        two = self.model.begin(0, BLOCK, 200)
        self.model.end(one)
        self.model.end(two)
        for value in (100, 200):
            self.assert_right(self.disk((0, content(value, 0, BLOCK))))
        self.assert_wrong(self.initial)

    def test_torn_foreign_and_misplaced_blocks(self):
        one, two = self.write(0, BLOCK), self.write(0, BLOCK)
        torn = content(one, 0, BLOCK)[:256] + content(two, 0, BLOCK)[256:]
        self.assert_wrong(self.disk((0, torn)))
        self.assert_wrong(self.disk((0, b"x" * BLOCK)))
        self.assert_wrong(self.disk((0, content(two, BLOCK, BLOCK))))
        self.assert_wrong(self.disk((BLOCK, content(two, BLOCK, BLOCK))))

    def test_a_crash_may_take_what_was_not_flushed(self):
        self.write(0, BLOCK)
        self.assert_right(self.initial, crashed=True)

    def test_a_crash_must_not_take_what_was_flushed(self):
        value = self.write(0, BLOCK)
        self.model.flushed(self.model.now())
        self.assert_wrong(self.initial, crashed=True)
        self.assert_right(self.disk((0, content(value, 0, BLOCK))), crashed=True)

    def test_a_flush_does_not_cover_what_was_under_way(self):
        op = self.model.begin(0, BLOCK, 100)
        began = self.model.now()
        self.model.end(op)
        self.model.flushed(began)
        self.assert_right(self.initial, crashed=True)

    def test_fua_is_a_flush_of_its_own(self):
        self.write(0, BLOCK, fua=True)
        self.assert_wrong(self.initial, crashed=True)

    def test_discard_may_do_nothing_but_bring_nothing_back(self):
        value = self.write(0, BLOCK)
        self.write(0, BLOCK, ZERO, discard=True)
        self.assert_right(self.disk((0, content(value, 0, BLOCK))))
        self.assert_right(self.disk((0, bytes(BLOCK))))
        self.assert_wrong(self.initial)  # what the backing file has

    def test_zeroes_that_nobody_wrote(self):
        self.assert_wrong(self.disk((0, bytes(BLOCK))))
        self.write(0, BLOCK, ZERO)
        self.assert_right(self.disk((0, bytes(BLOCK))))


class GuestStressTest(unittest.TestCase):
    """A job of 40 requests, played on a disk in memory."""

    LAST = 60

    def setUp(self):
        self.job = GuestStress(7, 4096, 64 * 512, max_blocks=8)
        self.before = content(1, 0, 4096 + 65 * 512)

    def play(self, last, without=()):
        disk = bytearray(self.before)
        for sequence in range(1, last + 1):
            op, block, count = stamp.request(7, 64, 8, True, True, sequence)
            if op in (stamp.READ, stamp.FLUSH) or sequence in without:
                continue
            for at in range(4096 + block * 512, 4096 + (block + count) * 512, 512):
                disk[at:at + 512] = stamp.make(at, sequence, 1, 7) if op == stamp.WRITE \
                    else bytes(512)
        return bytes(disk)

    def last_write(self):
        return max(s for s in range(1, self.LAST + 1)
                   if stamp.request(7, 64, 8, True, True, s)[0] == stamp.WRITE)

    def test_all_of_it_is_right(self):
        self.assertEqual(self.job.wrong(self.play(self.LAST), self.before, self.LAST, self.LAST), [])

    def test_a_request_that_was_flushed_is_missed(self):
        disk = self.play(self.LAST, without=(self.last_write(),))
        self.assertNotEqual(self.job.wrong(disk, self.before, self.LAST), [])
        self.assertEqual(self.job.wrong(disk, self.before, self.last_write() - 1), [])

    def test_a_torn_sector_is_noticed(self):
        disk = bytearray(self.play(self.LAST))
        _, block, _ = stamp.request(7, 64, 8, True, True, self.last_write())
        disk[4096 + block * 512 + 300] ^= 1
        self.assertNotEqual(self.job.wrong(bytes(disk), self.before, 0), [])

    def test_durable_is_read_from_the_output(self):
        lines = ["probe: flushed disk=0 sequence=12", "probe: flushed disk=0 sequence=9", "other"]
        self.assertEqual(self.job.durable(lines), 12)


if __name__ == "__main__":
    unittest.main(verbosity=2)
