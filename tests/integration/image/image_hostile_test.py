#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Images that are made to harm: each is refused, or found corrupt, in little time and memory, by every
command that looks at images."""
import os
import struct
import subprocess
import time
import zlib

from image_case import MINIVMM, ImageCase, main

# Sanitizers take memory and time of their own.
SANITIZED = os.environ.get("MINIVMM_SANITIZE", "") != ""
SECONDS = 20 if SANITIZED else 2  # of processor time
MEMORY = 4 << 20 if SANITIZED else 256 << 10  # KiB
CLUSTER = 65536
MOST = 0xffffffffffffffff


def be(value, size=8):
    return value.to_bytes(size, "big")


class HostileCase(ImageCase):
    def bounded(self, *words):
        """Runs ours; whatever it says, it neither crashes nor takes more than is allowed."""
        with open(self.path(".err"), "w+b") as err:
            child = subprocess.Popen([MINIVMM, "image", *words], cwd=self.folder, stderr=err,
                                     stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
            end = time.monotonic() + 60
            while True:
                pid, status, usage = os.wait4(child.pid, os.WNOHANG)
                if pid != 0:
                    break
                if time.monotonic() > end:
                    child.kill()
                time.sleep(0.002)
            child.returncode = os.waitstatus_to_exitcode(status)
            err.seek(0)
            text = err.read().decode("utf-8", "replace")
        told = f"{words}: status {child.returncode}, {text[:500]}"
        self.assertIn(child.returncode, (0, 1, 2, 3, 4), told)
        self.assertLess(usage.ru_utime + usage.ru_stime, SECONDS, told)
        self.assertLess(usage.ru_maxrss, MEMORY, told)
        return child.returncode, text

    def everything(self, name="x", more=()):
        """What each command answers: {command: (status, text)}"""
        out = os.path.join(self.folder, "out")
        commands = {"info": ["info", "-f", "qcow2", name], "check": ["check", "-f", "qcow2", name],
                    "map": ["map", "-f", "qcow2", *more, name],
                    "measure": ["measure", "-f", "qcow2", "-O", "qcow2", *more, name],
                    "convert": ["convert", "-f", "qcow2", "-O", "raw", *more, name, out],
                    "compare": ["compare", "-f", "qcow2", "-F", "qcow2", *more, name, name]}
        return {command: self.bounded(*words) for command, words in commands.items()}

    def patched(self, *patches, name="x", source="good"):
        data = bytearray(self.bytes_of(source))
        for offset, value in patches:
            if offset + len(value) > len(data):
                data.extend(bytes(offset + len(value) - len(data)))
            data[offset:offset + len(value)] = value
        with open(self.path(name), "wb") as file:
            file.write(data)

    def refused(self, *patches, source="good", says=""):
        """No command opens it, and each says why."""
        self.patched(*patches, source=source)
        for command, (status, text) in self.everything().items():
            self.assertNotEqual(status, 0, command)
            self.assertTrue(text.startswith("minivmm: "), text)
            self.assertIn(says, text)

    def corrupt(self, *patches, source="good", reads=None):
        """It can be opened; the check finds it, and reading what is damaged is an error."""
        self.patched(*patches, source=source)
        answers = self.everything()
        self.assertEqual(answers["check"][0], 2, answers["check"])
        if reads is not None:
            self.assertIn(reads, answers["convert"][1])
            self.assertNotEqual(answers["convert"][0], 0)


class HeaderTest(HostileCase):
    def setUp(self):
        super().setUp()
        self.make("-f", "qcow2", "good", "4M")
        self.qemu_io("good", "write -P 1 0 200k", "write -P 2 1M 64k")

    def field(self, offset, size):
        return int.from_bytes(self.bytes_of("good")[offset:offset + size], "big")

    def test_magic(self):
        self.refused((0, b"QFI\xfa"), says="not a qcow2 image")

    def test_version(self):
        for version in (0, 1, 4, 0xffffffff):
            self.refused((4, be(version, 4)), says="version")

    def test_cluster_bits(self):
        for bits in (0, 8, 22, 63, 64, 0xffffffff):
            self.refused((20, be(bits, 4)), says="cluster_bits")

    def test_header_length(self):
        for length in (0, 72, 103, 105, 65544, 0xfffffff8):
            self.refused((100, be(length, 4)), says="header_length")

    def test_refcount_order(self):
        for order in (7, 64, 0xffffffff):
            self.refused((96, be(order, 4)), says="refcount_order")

    def test_disk_size(self):
        for size in (1 << 63, MOST, 1 << 50):
            self.refused((24, be(size)))

    def test_l1_table(self):
        for entries in (0, (32 << 20) // 8 + 1, 0xffffffff):
            self.refused((36, be(entries, 4)), says="l1_size")
        end = os.path.getsize(self.path("good"))
        for offset in (0, 512, 7, (end + CLUSTER) // CLUSTER * CLUSTER, MOST - CLUSTER + 1, 1 << 62):
            self.refused((40, be(offset)), says="L1 table")
        self.refused((40, be(self.field(48, 8))), says="overlaps")

    def test_refcount_table(self):
        for clusters in (0, 129, 0xffffffff):
            self.refused((56, be(clusters, 4)), says="refcount")
        for offset in (0, 512, 3, 1 << 62, MOST - CLUSTER + 1):
            self.refused((48, be(offset)), says="refcount table")

    def test_snapshot_table(self):
        self.refused((60, be(65537, 4)), says="nb_snapshots")
        for offset in (0, 512, 1 << 62, MOST - CLUSTER + 1):
            self.refused((60, be(1, 4)), (64, be(offset)), says="snapshot table")

    def test_backing_name(self):
        for offset, length in ((8, 10), (112, 1024), (CLUSTER - 4, 8), (1 << 62, 4), (MOST, 4)):
            self.refused((8, be(offset)), (16, be(length, 4)), says="backing file's name")
        self.refused((8, be(600)), (16, be(4, 4)), (600, b"a\0bc"), says="zero byte")

    def test_backing_file_with_a_protocol_is_not_followed(self):
        for name in (b"nbd://127.0.0.1:1/x", b"json:{\"driver\":\"null\"}", b"/etc/passwd",
                     b"ssh://host/x", b"fat:/etc", b"../../../../etc/passwd", b"x"):
            self.patched((8, be(600)), (16, be(len(name), 4)), (600, name),
                         (112, be(0xe2792aca, 4) + be(3, 4) + b"raw".ljust(8, b"\0") + bytes(8)))
            answers = self.everything(more=())
            self.assertNotEqual(answers["convert"][0], 0, name)
            self.assertIn("minivmm: ", answers["convert"][1])
            # The sandbox opens the image alone: it says what is in it.
            self.assertEqual(answers["info"][0], 0, answers["info"])

    def test_extensions(self):
        self.refused((112, be(0x11111111, 4) + be(0xffffffff, 4)), says="past the end")
        self.refused((112, be(0x11111111, 4) + be(CLUSTER - 119, 4)), says="past the end")
        # A feature name table whose names do not end, and one of half an entry.
        self.patched((112, be(0x6803f857, 4) + be(48, 4) + b"\0\6" + b"n" * 46 + bytes(8)),
                     (72, be(1 << 6)))
        for command, (status, text) in self.everything().items():
            if command != "info":
                self.assertIn("n" * 46, text)
                self.assertNotEqual(status, 0)
        self.patched((112, be(0x6803f857, 4) + be(40, 4) + b"n" * 40 + bytes(8)))
        self.assertEqual(self.everything()["check"][0], 0)

    def test_unknown_incompatible_features(self):
        for bit in (5, 31, 63):
            self.patched((72, be(1 << bit)))
            for command, (status, text) in self.everything().items():
                if command != "info":
                    self.assertIn("incompatible feature", text)
                    self.assertNotEqual(status, 0)


class TablesTest(HostileCase):
    def setUp(self):
        super().setUp()
        self.make("-f", "qcow2", "good", "4M")
        self.qemu_io("good", "write -P 1 0 200k", "write -P 2 1M 64k")
        data = self.bytes_of("good")
        self.l1 = struct.unpack(">Q", data[40:48])[0]
        self.l2 = struct.unpack(">Q", data[self.l1:self.l1 + 8])[0] & 0x00fffffffffffe00
        self.table = struct.unpack(">Q", data[48:56])[0]

    def test_l1_entries(self):
        for entry in (1 << 63 | self.l2 | 1, 1 << 63 | 1 << 56 | self.l2, 1 << 62 | self.l2,
                      1 << 63 | self.l2 | 512):
            self.corrupt((self.l1, be(entry)), reads="L1")
        for beyond in (1 << 40, 0x00fffffffffe0000):
            self.corrupt((self.l1, be(1 << 63 | beyond)))

    def test_l1_entries_that_point_at_metadata(self):
        # The header, the refcount table, the L1 table itself.
        for place in (CLUSTER * 0, self.table, self.l1):
            self.patched((self.l1, be(1 << 63 | place)))
            answers = self.everything()
            self.assertNotEqual(answers["check"][0], 1, answers["check"])

    def test_l2_entries(self):
        data = self.l2 + CLUSTER
        for entry in (1 << 63 | data | 2, 1 << 63 | 1 << 56 | data, 1 << 63 | data | 512,
                      1 << 63 | 1 << 61 | data):
            self.corrupt((self.l2, be(entry)), reads="L2")
        self.corrupt((self.l2, be(1 << 63 | 0x00fffffffffe0000)))

    def test_l2_entries_that_point_at_metadata(self):
        for place in (self.table, self.l1, self.l2):
            self.corrupt((self.l2, be(1 << 63 | place)))

    def test_one_cluster_for_everything(self):
        entry = be(1 << 63 | self.l2 + CLUSTER)
        self.corrupt((self.l2, entry * (CLUSTER // 8)))

    def test_refcount_blocks(self):
        block = struct.unpack(">Q", self.bytes_of("good")[self.table:self.table + 8])[0]
        for entry in (block | 1, block + 512, 1 << 62, self.l1, self.table, 0):
            self.patched((self.table, be(entry)))
            self.assertEqual(self.everything()["check"][0], 2, hex(entry))
        # All blocks are one.
        self.patched((self.table, be(block) * (CLUSTER // 8)))
        self.assertEqual(self.everything()["check"][0], 2)

    def test_compressed_data(self):
        with open(self.path("disk"), "wb") as file:
            file.write(b"compressible " * 40000)
        for method in ("zlib", "zstd"):
            self.must(self.theirs("convert", "-c", "-O", "qcow2", "-o",
                                  f"compression_type={method}", "-f", "raw", "disk", "good"))
            data = self.bytes_of("good")
            l1 = struct.unpack(">Q", data[40:48])[0]
            l2 = struct.unpack(">Q", data[l1:l1 + 8])[0] & 0x00fffffffffffe00
            entry = struct.unpack(">Q", data[l2:l2 + 8])[0]
            at = entry & ((1 << 54) - 1)
            for bad in (b"\xff" * 64, bytes(64), data[at:at + 20] + b"\xff" * 200):
                self.patched((at, bad))
                status, text = self.everything()["convert"]
                self.assertEqual(status, 1, text)
                self.assertIn("compressed cluster", text)
            # Past the end of the file, in the header, and too long.
            for place in ((1 << 53), 512, at):
                wrong = 1 << 62 | 0xff << 54 | place
                self.patched((l2, be(wrong)))
                self.everything()
            # It says more than a cluster: what would not fit is an error or is not made.
            packer = zlib.compressobj(9, zlib.DEFLATED, -12)
            bomb = packer.compress(bytes(8 << 20)) + packer.flush()
            if method == "zlib":
                self.patched((at, bomb[:4096]))
                self.everything()

    def test_subclusters(self):
        self.make("-f", "qcow2", "-o", "extended_l2=on", "good", "4M")
        self.qemu_io("good", "write -P 1 0 200k")
        data = self.bytes_of("good")
        l1 = struct.unpack(">Q", data[40:48])[0]
        l2 = struct.unpack(">Q", data[l1:l1 + 8])[0] & 0x00fffffffffffe00
        # Allocated and zero at once.
        self.corrupt((l2 + 8, be(MOST)), reads="L2")
        # Allocated, and no host cluster.
        self.corrupt((l2, be(0) + be(0xffffffff)), reads="L2")

    def test_snapshots(self):
        self.must(self.theirs("snapshot", "-c", "one", "good"))
        data = self.bytes_of("good")
        at = struct.unpack(">Q", data[64:72])[0]
        self.patched((at + 36, be(0xffffffff, 4)))
        answers = self.everything()
        self.assertEqual(answers["check"][0], 2)
        self.assertEqual(answers["info"][0], 1)
        self.assertIn("snapshot", answers["info"][1])
        # Its L1 table: too large, misaligned, past the end.
        for patch in ((at + 8, be(0xffffffff, 4)), (at, be(512)), (at, be(1 << 62))):
            self.patched(patch)
            self.assertNotEqual(self.everything()["check"][0], 0)

    def test_bitmaps(self):
        self.must(self.theirs("bitmap", "--add", "good", "aaaa"))
        self.must(self.theirs("bitmap", "--add", "good", "bbbb"))
        data = self.bytes_of("good")
        extension = data.index(be(0x23852875, 4)) + 8
        directory = struct.unpack(">Q", data[extension + 16:extension + 24])[0]
        for patch in ((extension + 16, be(512)), (extension + 16, be(1 << 62)),
                      (extension + 16, be(0)), (extension, be(65536, 4)), (extension, be(0, 4)),
                      (extension + 8, be(1 << 62))):
            self.refused(patch, says="bitmap")
        # Entries: the table too large, misaligned, past the end; a name that goes on and on.
        for patch in ((directory + 8, be(0xffffffff, 4)), (directory, be(512)),
                      (directory, be(1 << 62)), (directory + 20, be(0xffffffff, 4)),
                      (directory + 18, be(0xffff, 2))):
            self.patched(patch)
            self.assertNotEqual(self.everything()["check"][0], 0, patch)
        # Two of one name.
        second = data.index(b"bbbb", directory)
        self.patched((second, b"aaaa"))
        self.everything()

    def changes(self, name="x"):
        """What each command that changes snapshots or bitmaps answers, each on a copy."""
        commands = (["snapshot", "-c", "new"], ["snapshot", "-a", "one"], ["snapshot", "-d", "one"],
                    ["bitmap", "--add", None, "new"], ["bitmap", "--remove", None, "aaaa"],
                    ["bitmap", "--clear", None, "aaaa"], ["bitmap", "--disable", None, "aaaa"],
                    ["resize", "-f", "qcow2", None, "+64k"])
        out = {}
        for words in commands:
            with open(self.path("y"), "wb") as file:
                file.write(self.bytes_of(name))
            words = [*words, None] if None not in words else words
            out[" ".join(words[:2])] = self.bounded(*["y" if w is None else w for w in words])
        return out

    def snapshot_list(self, entries):
        """Patches that append a list of snapshots, each (L1 offset, entries, more)."""
        at = (len(self.bytes_of("good")) + CLUSTER - 1) // CLUSTER * CLUSTER
        table = b"".join((be(l1) + be(size, 4) + be(1, 2) + be(1, 2) + bytes(20) + be(0, 4) + more
                          ).ljust(48, b"\0") for l1, size, more in entries)
        return (60, be(len(entries), 4) + be(at)), (at, table)

    def test_changes_of_bad_snapshots(self):
        self.must(self.theirs("snapshot", "-c", "one", "good"))
        data = self.bytes_of("good")
        at = struct.unpack(">Q", data[64:72])[0]
        l1 = struct.unpack(">Q", data[at:at + 8])[0]
        l2 = struct.unpack(">Q", data[l1:l1 + 8])[0] & 0x00fffffffffffe00
        table = struct.unpack(">Q", data[48:56])[0]
        for patch in ((at + 36, be(0xffffffff, 4)),
                      (at + 8, be(0xffffffff, 4)), (at, be(512)), (at, be(1 << 62)), (at, be(l2)),
                      (at, be(table)), (at, be(at)), (at, be(0)), (l1, be(l1)), (l1, be(table)),
                      (l1, be(at)), (l1, be(512)), (l1, be(1 << 62)), (l1, be(l2) * 8),
                      (l2, be(l2)), (l2, be(l1)), (l2, be(at)), (l2, be(table)), (l2, be(1 << 61)),
                      (l2, be(1 << 62 | 0xff << 54 | l1)), (at + 12, be(0xffff, 2)),
                      (at + 14, be(0xffff, 2)), (60, be(65536, 4)), (60, be(0xffffffff, 4))):
            self.patched(patch)
            self.changes()

    def test_an_l1_entry_of_flags_alone(self):
        """It points to no table, so that no room is taken for a copy of one."""
        l1 = struct.unpack(">Q", self.bytes_of("good")[40:48])[0]
        self.patched((l1, be(1 << 63)))
        status, text = self.changes()["snapshot -c"]
        self.assertEqual(status, 1, text)
        self.assertIn("points to no L2 table", text)

    def test_many_snapshots(self):
        l1 = struct.unpack(">Q", self.bytes_of("good")[40:48])[0]
        self.patched(*self.snapshot_list([(l1, 1, b"aa")] * 65536))
        self.changes()
        self.patched(*self.snapshot_list([(l1, 4 << 20, b"aa")] * 65536))
        self.everything()

    def test_changes_of_bad_bitmaps(self):
        for name in ("aaaa", "bbbb"):
            self.must(self.theirs("bitmap", "--add", "good", name))
        self.qemu_io("good", "write -P 5 0 200k")
        data = self.bytes_of("good")
        extension = data.index(be(0x23852875, 4)) + 8
        directory = struct.unpack(">Q", data[extension + 16:extension + 24])[0]
        table = struct.unpack(">Q", data[directory:directory + 8])[0]
        l1 = struct.unpack(">Q", data[40:48])[0]
        for patch in ((directory + 8, be(0xffffffff, 4)), (directory, be(512)), (directory, be(l1)),
                      (directory, be(directory)), (directory, be(1 << 62)),
                      (directory + 20, be(0xffffffff, 4)), (directory + 18, be(0xffff, 2)),
                      (directory + 17, b"\x3f"), (directory + 17, b"\x00"),
                      (directory + 12, be(0xffffffff, 4)), (table, be(l1)), (table, be(table)),
                      (table, be(1 << 62)), (table, be(512)), (table, be(MOST))):
            self.patched(patch)
            self.changes()

    def test_many_bitmaps(self):
        for name in ("aaaa", "bbbb"):
            self.must(self.theirs("bitmap", "--add", "good", name))
        data = self.bytes_of("good")
        extension = data.index(be(0x23852875, 4)) + 8
        directory = struct.unpack(">Q", data[extension + 16:extension + 24])[0]
        entry = data[directory:directory + 24]
        at = (len(data) + CLUSTER - 1) // CLUSTER * CLUSTER
        for same in (False, True):
            many = b"".join(entry[:18] + be(8, 2) + entry[20:24] +
                            (b"same name" if same else b"%08d" % i)[:8] for i in range(65535))
            self.patched((extension, be(65535, 4)), (extension + 8, be(len(many)) + be(at)),
                         (at, many))
            self.everything()
            self.changes()

    def test_data_file_with_a_protocol_is_not_followed(self):
        self.make("-f", "qcow2", "-o", "data_file=d", "good", "1M")
        data = self.bytes_of("good")
        at = data.index(be(0x44415441, 4))
        for name in (b"nbd://127.0.0.1:1/x", b"/etc/passwd", b"json:{}"):
            extension = be(0x44415441, 4) + be(len(name), 4) + name
            self.patched((at, extension.ljust(200, b"\0")))
            status, text = self.everything()["convert"]
            self.assertEqual(status, 1)
            self.assertIn("minivmm: ", text)


class LuksTest(HostileCase):
    def test_iteration_counts(self):
        secret = ("--object", "secret,id=s,data=abc")
        self.must(self.ours("create", *secret, "-f", "luks", "-o", "key-secret=s,iter-time=10",
                            "good", "1M"))
        for patch in ((208 + 4, be(0xffffffff, 4)), (164, be(0xffffffff, 4)), (208 + 4, be(0, 4)),
                      (208 + 44, be(0xffffffff, 4)), (208 + 40, be(0xffffffff, 4)),
                      (104, be(0xffffffff, 4)), (108, be(0xffffffff, 4)), (6, be(9, 2)),
                      (8, b"\xff" * 96)):
            self.patched(patch)
            status, text = self.bounded("map", *secret, "--image-opts",
                                        "driver=luks,file.filename=x,key-secret=s")
            self.assertEqual(status, 1, patch)
            self.assertTrue(text.startswith("minivmm: "), text)
            self.bounded("info", "x")


if __name__ == "__main__":
    main()
