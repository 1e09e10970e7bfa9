#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""One view of the data: what one front end has written, the other two read from then on."""

import hashlib
import itertools
import mmap
import os
import random
import struct
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.files import FuseDisk
from harness.nbd import NbdClient
from harness.scene import MIB, SLOW, Scene

DISK = 24 * MIB
ROUNDS = 400 if SLOW else 28


class Rounds(Scene):
    """In turn, at random: one front end changes a range, the other two read it and what lies
    around it (what a read-modify-write must leave alone)."""

    def make_disk(self, image_format):
        if image_format == "raw":
            with open(self.path("disk"), "wb") as f:
                f.write(self.random.randbytes(DISK))
        else:
            with open(self.path("base"), "wb") as f:
                f.write(self.random.randbytes(DISK // 2))
            self.overlay("disk", "base", DISK)
        with open(self.path("base" if image_format == "qcow2" else "disk"), "rb") as f:
            return bytearray(f.read().ljust(DISK, b"\0"))

    def pick(self):
        length = 512 * self.random.choice((1, 1, 2, 3, 7, 8, 9, 64, 127, 128, 129, 500, 2048))
        length = min(length, MIB)
        offset = self.random.randrange((DISK - length) // 512 + 1) * 512
        return offset, length

    def change_by_host(self, disk, offset, length):
        kind = self.random.randrange(8)
        if kind == 0:
            disk.zero(offset, length, no_hole=self.random.random() < 0.5)
            return bytes(length)
        data = self.random.randbytes(length)
        disk.write(offset, data, fua=kind == 1)
        return data

    def change_by_guest(self, vm, offset, length):
        # A request of the guest may have many segments, and the job many requests.
        shape = f"offset={offset} length={length} bs={self.random.choice((4096, 65536, MIB))} " \
                f"segments={self.random.choice((1, 3, 16))} depth=4"
        if self.random.randrange(8) == 0:
            vm.job(f"zero offset={offset} length={length}" + self.random.choice(("", " unmap")))
            return bytes(length)
        value = next(self.values)
        vm.job(f"write {shape} pattern={value}")
        return bytes([value]) * length

    def compare(self, name, disk, vm, offset, length, model):
        start = max(0, offset - 512 * self.random.randrange(9))
        end = min(DISK, offset + length + 512 * self.random.randrange(9))
        wanted = bytes(model[start:end])
        if name == "guest":
            got = vm.job(f"read offset={start} length={end - start} bs=262144")["sha256"]
            self.assertEqual(got, hashlib.sha256(wanted).hexdigest(), f"at {start:#x}")
            return
        got = disk.read(start, end - start)
        if got != wanted:
            bad = next(i for i in range(len(got)) if got[i] != wanted[i])
            self.fail(f"{name} reads {got[bad:bad + 16].hex()} at {start + bad:#x}, "
                      f"not {wanted[bad:bad + 16].hex()}")

    def rounds(self, image_format, cache, threads, backend):
        model = self.make_disk(image_format)
        self.values = itertools.cycle(range(1, 256))
        vm = self.boot("--disk", f"disk,format={image_format},id=disk0,cache={cache},num-queues=2",
                       "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                       "--export", "disk0,writable", "--io-threads", threads,
                       "--io-backend", backend)
        nbd = NbdClient(self.path("m.sock"))
        fuse = FuseDisk(self.path("mnt/disk0"))
        self.assertEqual((nbd.size, fuse.size), (DISK, DISK))
        disks = {"guest": None, "nbd": nbd, "fuse": fuse}
        for number in range(ROUNDS):
            writer = self.random.choice(list(disks))
            offset, length = self.pick()
            if writer == "guest":
                data = self.change_by_guest(vm, offset, length)
            else:
                data = self.change_by_host(disks[writer], offset, length)
            model[offset:offset + length] = data
            readers = [name for name in disks if name != writer]
            self.random.shuffle(readers)
            for name in readers:
                with self.subTest(number=number, writer=writer, offset=offset, length=length):
                    self.compare(name, disks[name], vm, offset, length, model)
        self.assertEqual(nbd.read(0, DISK), bytes(model))
        fuse.close()
        nbd.close()
        vm.type("exit 0")
        self.assert_ended(vm)
        if image_format == "qcow2":
            self.check("disk")
        else:
            with open(self.path("disk"), "rb") as f:
                self.assertEqual(f.read(), bytes(model))


def add_rounds():
    for image_format, cache, threads, backend in itertools.product(
            ("raw", "qcow2"), ("writeback", "none"), (1, 2), ("io_uring", "epoll")):
        def test(self, image_format=image_format, cache=cache, threads=threads, backend=backend):
            self.rounds(image_format, cache, threads, backend)
        setattr(Rounds, f"test_{image_format}_{cache}_{threads}_loops_{backend}", test)


add_rounds()


class Concurrent(Scene):
    """Under load: each slot of the disk is written by one thread with rising numbers, through
    NBD and FUSE in turn; whoever reads it, through anything, finds at least the number that had
    been written when the read began."""

    SLOTS = 48
    SECONDS = 20 if SLOW else 4

    def slot_data(self, number, length):
        return struct.pack("<Q", number) * (length // 8)

    def write_slot(self, slot, disks, seed):
        rng = random.Random(seed)
        offset, length = self.layout[slot]
        number = 0
        while not self.stopping.is_set():
            number += 1
            rng.choice(disks).write(offset, self.slot_data(number, length))
            self.published[slot] = number
            if rng.random() < 0.2:
                time.sleep(0.002)

    def read_slots(self, disk, seed):
        rng = random.Random(seed)
        seen = [0] * self.SLOTS
        while not self.stopping.is_set():
            slot = rng.randrange(self.SLOTS)
            offset, length = self.layout[slot]
            at_least = max(self.published[slot], seen[slot])
            data = disk.read(offset, length)
            number = struct.unpack_from("<Q", data)[0]
            # A slot is larger than what is written in one piece, so the parts of it may differ,
            # but none may be older than what was complete.
            oldest = min(struct.unpack(f"<{length // 8}Q", data))
            if oldest < at_least:
                raise AssertionError(f"slot {slot}: {oldest} was read after {at_least} was written")
            seen[slot] = max(seen[slot], oldest if number != oldest else number)
            self.reads += 1

    def guarded(self, function, *arguments):
        def body():
            try:
                function(*arguments)
            except Exception as e:  # pylint: disable=broad-except
                self.failures.append(repr(e))
                self.stopping.set()
        thread = threading.Thread(target=body)
        thread.start()
        return thread

    def run_load(self, threads, cache):
        self.create("disk", DISK, "-f", "qcow2")
        vm = self.boot("--disk", f"disk,id=disk0,cache={cache}", "--io-threads", threads,
                       "--nbd", "nbd+unix:///?socket=m.sock", "--fuse", "mnt",
                       "--export", "disk0,writable")
        # Slots share clusters with their neighbours, cross borders, and are not aligned to 4 KiB.
        self.layout = []
        at = 0
        for _ in range(self.SLOTS):
            length = 512 * self.random.choice((1, 2, 5, 8, 40, 130))
            self.layout.append((at, length))
            at += length + 512 * self.random.choice((0, 0, 1, 3))
        self.published = [0] * self.SLOTS
        self.reads = 0
        self.stopping = threading.Event()
        self.failures = []
        nbds = [NbdClient(self.path("m.sock")) for _ in range(2)]
        fuses = [FuseDisk(self.path("mnt/disk0")) for _ in range(2)]
        direct = FuseDisk(self.path("mnt/disk0"), os.O_SYNC)
        writers = [self.guarded(self.write_slot, slot, [*nbds, *fuses, direct], slot)
                   for slot in range(0, self.SLOTS, 4)]
        readers = [self.guarded(self.read_slots, disk, i)
                   for i, disk in enumerate([nbds[0], nbds[1], fuses[0], fuses[1]])]
        # The guest looks on: what it reads is not torn by sector.
        until = time.monotonic() + self.SECONDS
        while time.monotonic() < until and not self.stopping.is_set():
            vm.job(f"read length={at + 4096}", 60)
            time.sleep(0.05)
        self.stopping.set()
        for thread in writers + readers:
            thread.join(60)
            self.assertFalse(thread.is_alive(), "a request hangs")
        self.assertEqual(self.failures, [])
        self.assertGreater(self.reads, 100)
        # Everybody is done: the guest sees the last number everywhere.
        for slot in range(0, self.SLOTS, 4):
            offset, length = self.layout[slot]
            data = self.slot_data(self.published[slot], length)
            got = vm.job(f"read offset={offset} length={length}")["sha256"]
            self.assertEqual(got, hashlib.sha256(data).hexdigest(), f"slot {slot}")
        for disk in (*nbds, *fuses, direct):
            disk.close()
        vm.type("exit 0")
        self.assert_ended(vm)
        self.check("disk")

    def test_one_loop(self):
        self.run_load(1, "writeback")

    def test_two_loops(self):
        self.run_load(2, "writeback")

    def test_two_loops_direct(self):
        self.run_load(2, "none")


class Mapped(Scene):
    """A file of the mount that is mapped shows what others wrote, or cannot be mapped."""

    def test_mapping_is_not_stale(self):
        self.create("disk", DISK, "-f", "qcow2")
        self.daemon("serve", "--disk", "disk,id=disk0", "--nbd", "nbd+unix:///?socket=m.sock",
                    "--fuse", "mnt", "--export", "disk0,writable")
        nbd = NbdClient(self.path("m.sock"))
        fuse = FuseDisk(self.path("mnt/disk0"))
        try:
            view = mmap.mmap(fuse.fd, DISK, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as e:
            self.skipTest(f"this kernel maps no file that is opened for direct I/O: {e}")
        for number in range(1, 200):
            offset = self.random.randrange(DISK // 4096) * 4096
            before = view[offset:offset + 8]  # the page is in the cache from now on
            self.assertEqual(len(before), 8)
            data = struct.pack("<Q", number) * 512
            self.random.choice((nbd, fuse)).write(offset, data)
            # The kernel is told beside the request, so it may be a moment later.
            until = time.monotonic() + 5
            while view[offset:offset + 4096] != data and time.monotonic() < until:
                time.sleep(0.001)
            self.assertEqual(view[offset:offset + 4096], data, f"round {number}: a stale page")
        view.close()
        fuse.close()
        nbd.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
