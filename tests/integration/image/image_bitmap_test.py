# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps beside qemu-img's: the same answers, and images that both change in turn."""
import json
import random

from image_case import SEED, ImageCase, main


class Bitmaps(ImageCase):
    def dirty(self, name, bitmap, size):
        """The dirty ranges, as QEMU reads them."""
        told = self.must(self.run_in(
            self.folder, "nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", "--",
            "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap, name, "]"))
        out = set()
        for extent in json.loads(told.out):
            if extent["type"] & 1:
                out.update(range(extent["offset"] // 512,
                                 (extent["offset"] + extent["length"]) // 512))
        return {block for block in out if block < size // 512}

    def test_answers(self):
        for steps in ([["--add", "b"], ["--add", "b"], ["--add", "--disable", "-g", "4k", "c"],
                       ["--merge", "c", "b"], ["--disable", "--enable", "b"], ["--clear", "c"],
                       ["--remove", "b"], ["--remove", "b"]],
                      [["--clear", "no"], ["--enable", "no"], ["--add", "b"],
                       ["--merge", "no", "b"], ["--merge=b", "no"]],
                      [["--add", "-g", size, "b"] for size in ("3k", "256", "4G", "1", "x", "1M")],
                      [["--add", "--clear", "--add", "b"], ["b"], ["--add"], ["-g", "4k", "b"],
                       ["--clear", "-g", "4k", "b"], ["--clear", "-F", "qcow2", "b"],
                       ["--clear", "-b", "other", "b"], ["--add", ""], ["--add", "x" * 1023]]):
            for name in "ab":
                self.make("-f", "qcow2", name, "10M")
            for *options, bitmap in steps:
                with self.subTest(options=options, bitmap=bitmap):
                    words = [["bitmap", *options, name] for name in "ab"]
                    tail = [bitmap] if not bitmap.startswith("-") else []
                    if not tail:
                        words = [["bitmap", *options, bitmap, name] for name in "ab"]
                    ours = self.drop_in(*words[0], *tail)
                    theirs = self.theirs(*words[1], *tail)
                    self.assertEqual((ours.status, ours.out, ours.err),
                                     (theirs.status, theirs.out, theirs.err))
            infos = [json.loads(self.must(self.theirs("info", "--output=json", name)).out)
                     ["format-specific"]["data"].get("bitmaps") for name in "ab"]
            self.assertEqual(*infos)
            self.assertEqual(self.theirs("check", "a").status, 0)

    def test_a_name_that_is_too_long(self):
        self.make("-f", "qcow2", "x", "1M")
        self.must(self.ours("bitmap", "--add", "x", "n" * 1024), 1)
        self.assertNotIn("bitmaps", self.must(self.theirs("info", "x")).out)

    def test_where_there_can_be_none(self):
        self.make("-f", "qcow2", "-o", "compat=0.10", "old", "1M")
        self.make("-f", "raw", "raw", "1M")
        for name, fmt in (("old", "qcow2"), ("raw", "raw")):
            self.must(self.ours("bitmap", "-f", fmt, "--add", name, "b"), 1)
            self.must(self.ours("bitmap", "-f", fmt, "--clear", name, "b"), 1)

    def test_what_missed_writes_is_not_used(self):
        self.make("-f", "qcow2", "x", "1M")
        self.must(self.ours("bitmap", "--add", "x", "b"))
        with self.in_use("x") as user:
            user.process.kill()
        self.assertIn("in-use", self.must(self.ours("info", "x")).out)
        for action in ("--clear", "--enable", "--disable", "--merge=b"):
            self.same_answer("bitmap", action, "x", "b", status=1)
        self.must(self.ours("bench", "-w", "-c", "1", "x"))
        self.assertIn("in-use", self.must(self.ours("info", "x")).out)
        self.must(self.ours("bitmap", "--remove", "x", "b"))
        self.assertNotIn("bitmaps", self.must(self.theirs("info", "x")).out)
        self.must(self.theirs("check", "x"))

    def test_merging_from_another_image(self):
        for name in "xy":
            self.make("-f", "qcow2", name, "4M")
            self.must(self.theirs("bitmap", "--add", "-g", "4k" if name == "x" else "64k",
                                  name, "b"))
        self.qemu_io("y", "write 1M 100k")
        self.must(self.ours("bitmap", "--merge", "b", "-b", "y", "-F", "qcow2", "x", "b"))
        self.assertEqual(self.dirty("x", "b", 4 << 20), set(range(2048, 2048 + 256)))

    def test_converted_with_the_image(self):
        self.make("-f", "qcow2", "x", "4M")
        for name, *options in (("a", "-g", "4k"), ("b", "--disable"), ("c", "-g", "512")):
            self.must(self.theirs("bitmap", "--add", *options, "x", name))
        self.qemu_io("x", "write 1M 100k", "write 3M 512")
        for tool, name in ((self.ours, "ours"), (self.theirs, "theirs")):
            self.must(tool("convert", "-O", "qcow2", "--bitmaps", "x", name))
        infos = []
        for name in ("ours", "theirs"):
            told = json.loads(self.must(self.theirs("info", "--output=json", name)).out)
            infos.append(sorted((b["name"], b["flags"], b["granularity"])
                                for b in told["format-specific"]["data"]["bitmaps"]))
            self.must(self.theirs("check", name))
        self.assertEqual(*infos)
        for bitmap in "abc":
            self.assertEqual(self.dirty("ours", bitmap, 4 << 20),
                             self.dirty("theirs", bitmap, 4 << 20))
        self.must(self.ours("convert", "-O", "qcow2", "x", "without"))
        self.assertNotIn("bitmaps", self.must(self.theirs("info", "without")).out)

    def test_conversions_that_are_refused(self):
        self.make("-f", "qcow2", "x", "1M")
        self.make("-f", "raw", "raw", "1M")
        self.must(self.theirs("bitmap", "--add", "x", "b"))
        with self.in_use("x") as user:
            user.process.kill()
        for arguments in (["--bitmaps", "x"], ["--skip-broken-bitmaps", "x"],
                          ["--bitmaps", "raw"], ["--bitmaps", "--skip-broken-bitmaps", "x"]):
            self.same_answer("convert", "-O", "qcow2", *arguments, "out")
        self.assertNotIn("bitmaps", self.must(self.theirs("info", "out")).out)

    def test_kept_by_what_changes_the_image(self):
        self.make("-f", "qcow2", "base", "4M")
        self.make("-f", "qcow2", "other", "4M")
        self.must(self.theirs("bitmap", "--add", "base", "below"))
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "x")
        self.must(self.theirs("bitmap", "--add", "x", "b"))
        self.must(self.theirs("bitmap", "--add", "--disable", "x", "off"))
        self.qemu_io("x", "write 1M 64k")
        expected = set(range(2048, 2048 + 128))
        for arguments in (["rebase", "-b", "other", "-F", "qcow2"],
                          ["rebase", "-u", "-b", "base", "-F", "qcow2"], ["snapshot", "-c", "s"],
                          ["rebase", "-b", "base", "-F", "qcow2"], ["snapshot", "-d", "s"]):
            self.must(self.ours(*arguments, "x"))
            self.must(self.theirs("check", "x"))
            self.assertEqual(self.dirty("x", "b", 4 << 20), expected, arguments)
        for size in ("6M", "2M", "3M"):
            self.must(self.ours("resize", "--shrink", "x", size))
            self.must(self.theirs("check", "x"))
            self.assertEqual(self.dirty("x", "b", int(size[:-1]) << 20), expected, size)
            self.assertEqual(self.dirty("x", "off", int(size[:-1]) << 20), set(), size)
        self.must(self.ours("commit", "-d", "x"))
        # With the zeroes by which the disk grew.
        self.assertEqual(self.dirty("base", "below", 4 << 20), expected | set(range(4096, 6144)))
        self.must(self.ours("snapshot", "-c", "s", "x"))
        self.must(self.ours("snapshot", "-a", "s", "x"))
        self.assertEqual(self.dirty("x", "b", 3 << 20), set(range(6144)),
                         "all may differ after going back to a snapshot")
        self.assertEqual(self.dirty("x", "off", 3 << 20), set())

    def test_both_in_turn(self):
        rng = random.Random(SEED)
        for turn in range(6):
            size = rng.randrange(1, 40) * 100 * 1024
            cluster = rng.choice(["512", "4k", "64k", "1M"])
            self.make("-f", "qcow2", "-o", f"cluster_size={cluster}", "x", str(size))
            model = {}  # name: [granularity, enabled, dirty blocks of 512]
            for step in range(30):
                with self.subTest(turn=turn, step=step):
                    self.change("x", size, model, rng)
            self.must(self.theirs("check", "x"))
            self.must(self.ours("check", "x"))
            for name, (_, _, dirty) in model.items():
                self.assertEqual(self.dirty("x", name, size), dirty, f"{name} in turn {turn}")

    def change(self, image, size, model, rng):
        tool = rng.choice([self.ours, self.theirs])
        kind = rng.randrange(10)
        name = rng.choice(sorted(model)) if model else ""
        if kind < 2 and len(model) < 5 or not model:
            name = f"bitmap{rng.randrange(10 ** 6)}" + "x" * rng.choice([0, 0, 300])
            granularity = 512 << rng.randrange(9)
            enabled = rng.random() < 0.7
            self.must(tool("bitmap", "--add", "-g", str(granularity),
                           *([] if enabled else ["--disable"]), image, name))
            model[name] = [granularity, enabled, set()]
        elif kind == 2:
            self.must(tool("bitmap", "--remove", image, name))
            del model[name]
        elif kind == 3:
            self.must(tool("bitmap", "--clear", image, name))
            model[name][2] = set()
        elif kind == 4:
            model[name][1] = not model[name][1]
            self.must(tool("bitmap", "--enable" if model[name][1] else "--disable", image, name))
        elif kind == 5:
            other = rng.choice(sorted(model))
            self.must(tool("bitmap", "--merge", other, image, name))
            self.mark(model[name], model[other][2], size)
        else:
            offset = rng.randrange(size // 512) * 512
            length = min(rng.randrange(1, 400) * 512, size - offset)
            if tool == self.ours:
                self.must(self.ours("bench", "-w", "-c", "1", "-d", "1", "-o", str(offset), "-s",
                                    str(length), image))
            else:
                self.qemu_io(image, f"write {offset} {length}")
            blocks = set(range(offset // 512, (offset + length) // 512))
            for entry in model.values():
                if entry[1]:
                    self.mark(entry, blocks, size)

    @staticmethod
    def mark(entry, blocks, size):
        grain = entry[0] // 512
        for bit in {block // grain for block in blocks}:
            entry[2].update(range(bit * grain, min((bit + 1) * grain, size // 512)))


if __name__ == "__main__":
    main()
