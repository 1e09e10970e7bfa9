# SPDX-License-Identifier: Apache-2.0
"""`minivmm image compare` and `map` and `measure` beside qemu-img's."""
import json
import os
import random
import xml.etree.ElementTree

from image_case import SEED, ImageCase, main


class Compare(ImageCase):
    def test_answers_are_qemu_imgs(self):
        rng = random.Random(SEED)
        self.fill("a", 3 << 20, rng)
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "a", "b"))
        self.must(self.theirs("convert", "-c", "-f", "raw", "-O", "qcow2", "a", "c"))
        self.make("-f", "qcow2", "-b", "b", "-F", "qcow2", "overlay")
        for one in "abc":
            for other in ("a", "b", "c", "overlay"):
                self.same_answer("compare", one, other, status=0)
                self.same_answer("compare", "-s", one, other)
                self.same_answer("compare", "-q", one, other)
        for number in range(20):
            what = "-z" if number % 4 == 3 else f"-P {rng.randrange(256)}"
            self.qemu_io("overlay", f"write {what} {rng.randrange(3_000_000)} "
                         f"{rng.randint(1, 70000)}")
            self.same_answer("compare", "b", "overlay")
            self.same_answer("compare", "-s", "overlay", "b")

    def test_sizes(self):
        self.make("-f", "raw", "short", "1M")
        self.make("-f", "raw", "long", "2M")
        for options in ([], ["-s"], ["-q"], ["-f", "raw", "-F", "raw"]):
            self.same_answer("compare", *options, "short", "long")
        with open(self.path("long"), "r+b") as file:
            file.seek(1_500_000)
            file.write(b"x")
        self.same_answer("compare", "-f", "raw", "-F", "raw", "short", "long", status=1)
        self.same_answer("compare", "-f", "raw", "-F", "raw", "long", "short", status=1)

    def test_what_could_not_be_found_out_is_no_difference(self):
        self.make("-f", "qcow2", "a", "1M")
        for arguments in (["a", "no"], ["-T", "bad", "a", "a"]):
            self.same_answer("compare", *arguments, status=2)
        for arguments in (["a"], ["a", "a", "a"]):
            self.same_answer("compare", *arguments, status=1)


class Map(ImageCase):
    def test_answers_are_qemu_imgs(self):
        rng = random.Random(SEED)
        self.fill("plain", 5 << 20, rng)
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "plain", "base"))
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay", "7M")
        self.make("-f", "qcow2", "-b", "overlay", "-F", "qcow2", "-o", "cluster_size=4k", "top")
        for number in range(12):
            for name in ("overlay", "top"):
                at = rng.randrange(6 << 20)
                self.qemu_io(name, f"write {'-z ' if number % 3 == 0 else ''}{at} "
                             f"{rng.randint(1, 90000)}")
        with open(self.path("plain"), "ab") as file:
            file.truncate((5 << 20) + 100)  # its last sector is short
        for name in ("plain", "base", "overlay", "top"):
            for options in ([], ["--output=json"], ["--output=json", "-s", "1M", "-l", "1234567"],
                            ["-s", "100000"], ["-l", "5"]):
                with self.subTest(seed=SEED, name=name, options=options):
                    if name == "plain":
                        options = ["-f", "raw", *options]
                    self.same_answer("map", *options, name, status=0)

    def test_compressed_clusters_are_at_no_place(self):
        rng = random.Random(SEED)
        self.fill("plain", 1 << 20, rng)
        self.must(self.theirs("convert", "-c", "-f", "raw", "-O", "qcow2", "plain", "packed"))
        self.same_answer("map", "--output=json", "packed", status=0)
        self.assertIn("compressed", self.same_answer("map", "packed", status=1).err)

    def test_a_backing_file_is_opened_only_where_that_is_asked_for(self):
        self.make("-f", "qcow2", "base", "1M")
        self.qemu_io("base", "write 0 64k")
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay")
        self.qemu_io("overlay", "write 128k 64k")
        alone = json.loads(self.must(self.ours("map", "--output=json", "overlay")).out)
        self.assertEqual([(e["start"], e["present"], e["depth"]) for e in alone],
                         [(0, False, 1), (131072, True, 0), (196608, False, 1)])
        os.rename(self.path("base"), self.path("away"))
        self.must(self.ours("map", "overlay"))
        self.must(self.ours("map", "--trusted", "overlay"), 1)
        os.rename(self.path("away"), self.path("base"))
        followed = json.loads(self.must(self.ours("map", "--trusted", "--output=json",
                                                  "overlay")).out)
        theirs = json.loads(self.must(self.theirs("map", "--output=json", "overlay")).out)
        self.assertEqual(followed, theirs)

    def test_picture(self):
        self.make("-f", "qcow2", "base", "1M")
        self.qemu_io("base", "write 0 64k", "write -z 512k 64k")
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay")
        self.qemu_io("overlay", "write 128k 64k")
        self.must(self.ours("map", "--trusted", "--svg", "out.svg", "overlay"))
        root = xml.etree.ElementTree.parse(self.path("out.svg")).getroot()
        text = "".join(root.itertext())
        self.assertIn("base", text)
        self.assertIn("overlay", text)


class Measure(ImageCase):
    def test_answers_are_qemu_imgs(self):
        rng = random.Random(SEED)
        self.fill("plain", 5_000_000, rng)
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "plain", "image"))
        self.make("-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay", "9M")
        self.qemu_io("overlay", "write 6M 100k", "write -z 1M 1M")
        self.must(self.theirs("bitmap", "--add", "image", "one"))
        for name in ("plain", "image", "overlay"):
            for options in ([], ["-O", "qcow2"], ["-O", "qcow2", "-o", "cluster_size=4k"],
                            ["-O", "qcow2", "-o", "preallocation=metadata"],
                            ["--output=json", "-O", "qcow2", "-o", "refcount_bits=1"]):
                with self.subTest(name=name, options=options):
                    self.same_answer("measure", *options, name, status=0)
        for options in (["--size", "10G"], ["-O", "qcow2", "--size", "1T"], ["--size", "1000"],
                        ["--output=json", "-O", "qcow2", "-o",
                         "cluster_size=2M,refcount_bits=64", "--size", "3T"]):
            self.same_answer("measure", *options, status=0)

    def test_wrong_calls(self):
        self.make("-f", "raw", "a", "1M")
        for arguments in ([], ["--size", "1G", "a"], ["--size", "x"], ["no"], ["-O", "frob", "a"]):
            self.same_answer("measure", *arguments, status=1)


if __name__ == "__main__":
    main()
