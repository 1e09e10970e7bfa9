#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`minivmm image amend` of qcow2 images, beside qemu-img's."""
import json
import random
import shutil

from image_case import SEED, ImageCase, main


class AmendTest(ImageCase):
    def setUp(self):
        super().setUp()
        self.fill("disk", 3 << 20, random.Random(SEED))

    def copy(self, *options):
        """The disk as a qcow2 image of qemu-img's, with zero clusters and an unused one."""
        self.must(self.theirs("convert", "-O", "qcow2", *options, "disk", "x"))
        self.qemu_io("x", "write -z 64k 128k", "write -z -u 1M 64k", "discard 2M 64k")
        self.must(self.theirs("convert", "-O", "raw", "x", "disk"))

    def amended(self, options, status=0):
        """Ours does to a copy what qemu-img does to the image, and both are sound."""
        shutil.copy(self.path("x"), self.path("y"))
        theirs = self.theirs("amend", "-o", options, "x")
        ours = self.drop_in("amend", "-o", options, "y")
        told = f"{options}\n=== ours\n{ours}\n=== theirs\n{theirs}"
        self.assertEqual((ours.status, theirs.status), (status, status), told)
        self.assertEqual(ours.out, theirs.out, told)
        self.must(self.theirs("check", "y"))
        self.must(self.ours("check", "y"))
        mine, other = (self.facts(name) for name in ("y", "x"))
        self.assertEqual(mine, other, told)
        self.must(self.theirs("compare", "x", "y"))
        return ours

    def facts(self, name):
        facts = json.loads(self.must(self.theirs("info", "--output=json", name)).out)
        for changing in ("actual-size", "filename", "full-backing-filename"):
            facts.pop(changing, None)
        return facts

    def test_version_up_and_down(self):
        self.copy("-o", "compat=0.10")
        self.amended("compat=1.1")
        self.amended("compat=v3,lazy_refcounts=on")
        self.amended("lazy_refcounts=off")
        self.amended("compat=0.10")
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "disk", "y"))

    def test_version_down_above_a_backing_file(self):
        # Zeroes that hide the backing file's data must stay zeroes.
        self.make("-f", "qcow2", "-b", "disk", "-F", "raw", "x")
        self.qemu_io("x", "write -P 7 100k 5k", "write -z 0 512k", "write -z 2M 64k")
        self.amended("compat=0.10")

    def test_refcount_width(self):
        self.copy()
        for bits in (1, 64, 2, 32, 4, 8, 16):
            self.amended(f"refcount_bits={bits}")
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "disk", "y"))
        # It is written to afterwards as any other.
        self.qemu_io("y", "write -P 9 0 3M")
        self.must(self.theirs("check", "y"))

    def test_refcount_width_with_snapshots(self):
        self.copy()
        self.must(self.theirs("snapshot", "-c", "one", "x"))
        self.qemu_io("x", "write -P 3 0 300k")
        self.amended("refcount_bits=2")
        shutil.copy(self.path("x"), self.path("y"))
        refused = self.must(self.ours("amend", "-o", "refcount_bits=1", "y"), 1)
        self.assertIn("Cannot decrease refcount entry width to 1 bits: Cluster at offset",
                      refused.err)
        self.assertEqual(self.bytes_of("x"), self.bytes_of("y"))
        self.assertIn("Internal snapshots prevent downgrade", self.must(
            self.ours("amend", "-o", "compat=0.10,refcount_bits=16", "y"), 1).err)

    def test_size(self):
        self.copy()
        self.amended("size=5M")
        self.amended("size=8M,compat=1.1")

    def test_backing_file_is_for_rebase_to_change(self):
        self.make("-f", "qcow2", "-b", "disk", "-F", "raw", "x")
        self.qemu_io("x", "write -P 7 100k 5k")
        shutil.copy(self.path("disk"), self.path("moved"))
        done = self.amended("backing_file=moved,backing_fmt=raw", 1)
        self.assertIn("Cannot amend the backing file", done.err)
        self.amended("backing_file=disk,backing_fmt=raw,compat=1.1")

    def test_data_file(self):
        self.make("-f", "qcow2", "-o", "data_file=d", "x", "1M")
        shutil.copy(self.path("d"), self.path("e"))
        self.amended("data_file=e")
        self.make("-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "x", "1M")
        self.amended("data_file_raw=off")

    def test_what_is_refused(self):
        def refused(name, options, text):
            before = self.bytes_of(name)
            done = self.must(self.ours("amend", "-o", options, name), 1)
            self.assertIn(text, done.err)
            self.assertEqual(self.bytes_of(name), before)
        self.make("-f", "qcow2", "-o", "compat=0.10", "two", "1M")
        self.make("-f", "qcow2", "-o", "extended_l2=on", "ext", "1M")
        self.make("-f", "qcow2", "-o", "refcount_bits=8", "eight", "1M")
        refused("two", "lazy_refcounts=on", "Lazy refcounts only supported")
        refused("two", "refcount_bits=8", "Refcount widths other than 16")
        refused("two", "refcount_bits=3", "must be a power of two")
        refused("two", "data_file=q", "data-file can only be set")
        refused("two", "cluster_size=128k", "Invalid parameter 'cluster_size'")
        refused("two", "backing_fmt=raw", "Cannot amend the backing file")
        refused("ext", "compat=0.10", "incompatible features")
        refused("ext", "data_file_raw=on", "data-file-raw cannot be set")
        refused("eight", "compat=0.10", "requires refcount_bits=16")
        refused("eight", "encrypt.state=active,encrypt.new-secret=q", "not encrypted")

    def test_cut_short_the_old_image_is_there(self):
        """The header changes last: all that came before it may be missing."""
        self.copy()
        before = self.bytes_of("x")
        self.must(self.ours("amend", "-o", "refcount_bits=64", "x"))
        after = self.bytes_of("x")
        with open(self.path("z"), "wb") as file:
            file.write(before[:512] + after[512:])
        # Unused clusters at the end, whose counts the old structure does not have.
        self.must(self.theirs("check", "-r", "leaks", "z"))
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "disk", "z"))


if __name__ == "__main__":
    main()
