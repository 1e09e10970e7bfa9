# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots beside qemu-img's: the same answers, and images that both change in turn."""
import json
import random
import re

from image_case import SEED, ImageCase, main

DATES = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


class Snapshots(ImageCase):
    def content(self, image, *options):
        self.must(self.theirs("convert", "-f", "qcow2", "-O", "raw", *options, image, "content"))
        return self.bytes_of("content")

    def test_answers(self):
        for steps in ([["-l"], ["-c", "s1"], ["-c", "s1"], ["-c", "7"], ["-c", ""], [], ["-l"],
                       ["-a", "nope"], ["-a", "2"], ["-d", "2"], ["-d", "nope"], ["-d", "s1"],
                       ["-q", "-c", "x"], ["-a", "7"], ["-U", "-l"], ["-l"], ["-d", "s1"],
                       ["-d", "7"], ["-d", ""], ["-d", "x"], ["-l"]],
                      [["-l", "-c", "x"], ["-c", "x", "-d", "y"], ["-U", "-c", "z"], ["--bogus"],
                       ["-c", "long " * 60], ["-l"]]):
            for folder in ("a", "b"):
                self.must(self.run_in(self.folder, "mkdir", "-p", folder))
                self.make("-f", "qcow2", f"{folder}/x", "10M")
            for arguments in steps:
                with self.subTest(arguments=arguments):
                    ours = self.drop_in("snapshot", *arguments, "x", folder=self.path("a"))
                    theirs = self.theirs("snapshot", *arguments, "x", folder=self.path("b"))
                    if arguments[:1] != ["-l"] or "long" not in theirs.out:
                        self.assertEqual(
                            (ours.status, DATES.sub("", ours.out), ours.err),
                            (theirs.status, DATES.sub("", theirs.out), theirs.err))
            self.must(self.theirs("check", "a/x"))
            lists = [json.loads(self.must(self.theirs("info", "--output=json", f"{folder}/x")).out)
                     .get("snapshots", []) for folder in "ab"]
            for entry in lists[0] + lists[1]:
                entry["date-sec"] = entry["date-nsec"] = 0
                entry["name"] = entry["name"][:200]
            self.assertEqual(*lists)

    def test_where_there_can_be_none(self):
        self.make("-f", "raw", "raw", "1M")
        self.make("-f", "qcow2", "-o", "data_file=data", "outside", "1M")
        for name in ("raw", "outside"):
            self.must(self.ours("snapshot", "-c", "x", name), 1)
        self.same_answer("snapshot", "-c", "x", "outside", err=False)
        self.same_answer("snapshot", "-l", "raw")
        self.same_answer("snapshot", "-l", "no-such-file", status=1)

    def test_an_old_image_with_snapshots_keeps_its_size(self):
        self.make("-f", "qcow2", "-o", "compat=0.10", "old", "8M")
        self.must(self.theirs("snapshot", "-c", "x", "old"))
        self.same_answer("resize", "old", "16M", status=1)
        told = self.must(self.ours("resize", "old", "16M"), 1).err
        self.assertIn("old (qcow2): a version 2 image that has snapshots cannot be resized", told)

    def test_a_disk_of_no_bytes(self):
        """Its L1 table has no entries, for which there is no room to be found."""
        for compat in ("0.10", "1.1"):
            self.make("-f", "qcow2", "-o", f"compat={compat}", "x", "0")
            for arguments in (["-c", "a"], ["-c", "b"], ["-a", "a"], ["-d", "a"], ["-d", "b"]):
                with self.subTest(compat=compat, arguments=arguments):
                    self.must(self.ours("snapshot", *arguments, "x"))
                    self.must(self.theirs("check", "x"))

    def test_the_state_of_a_machine_is_kept(self):
        """QEMU keeps it behind the disk's end, in the snapshot's L1 table."""
        self.make("-f", "qcow2", "x", "4M")
        self.qemu_io("x", "write -P 1 0 1M", "write -b -P 7 0 200k")
        self.must(self.theirs("snapshot", "-c", "machine", "x"))
        state = self.must(self.run_in(self.folder, "qemu-io", "-f", "qcow2", "-c",
                                      "read -b -P 7 0 200k", "x")).out
        self.assertNotIn("failed", state)
        for arguments in (["-c", "ours"], ["-a", "machine"], ["-d", "ours"]):
            self.qemu_io("x", "write -P 2 512k 1M")
            self.must(self.ours("snapshot", *arguments, "x"))
            self.must(self.theirs("check", "x"))
        self.must(self.theirs("snapshot", "-a", "machine", "x"))
        self.must(self.theirs("check", "x"))
        self.qemu_io("x", "read -P 1 0 1M")

    def test_both_in_turn(self):
        rng = random.Random(SEED)
        for turn in range(5):
            options = rng.choice(["cluster_size=64k", "cluster_size=512", "cluster_size=4k",
                                  "compat=0.10", "extended_l2=on", "refcount_bits=64",
                                  "refcount_bits=4", "lazy_refcounts=on"])
            size = rng.randrange(1, 20) * 256 * 1024
            self.make("-f", "qcow2", "-o", options, "x", str(size))
            disk, snapshots = bytearray(size), []
            for step in range(25):
                with self.subTest(turn=turn, step=step, options=options):
                    disk = self.change("x", disk, snapshots, options != "compat=0.10", rng)
            with self.subTest(turn=turn, options=options):
                self.must(self.theirs("check", "x"))
                self.must(self.ours("check", "x"))
                self.assertTrue(self.content("x") == disk)
                for name, content in snapshots:
                    # qemu-img reads a snapshot as if it had the size that the disk has now.
                    theirs = self.content("x", "-l", f"snapshot.name={name}")
                    common = min(len(theirs), len(content))
                    self.assertTrue(theirs[:common] == content[:common])
                    self.must(self.ours("convert", "-f", "qcow2", "-O", "raw", "-l",
                                        f"snapshot.name={name}", "x", "ours"))
                    self.assertTrue(self.bytes_of("ours") == content)
                ours = self.must(self.drop_in("snapshot", "-l", "x")).out
                self.assertEqual(ours, self.must(self.theirs("snapshot", "-l", "x")).out)

    def change(self, image, disk, snapshots, may_resize, rng):
        tool = rng.choice([self.ours, self.theirs])
        kind = rng.randrange(9)
        if kind < 2 and len(snapshots) < 5:
            name = f"name{rng.randrange(10 ** 9)}"
            self.must(tool("snapshot", "-c", name, image))
            snapshots.append((name, bytes(disk)))
        elif kind == 2 and snapshots:
            name, content = rng.choice(snapshots)
            self.must(tool("snapshot", "-a", name, image))
            return bytearray(content)
        elif kind == 3 and snapshots:
            index = rng.randrange(len(snapshots))
            self.must(tool("snapshot", "-d", snapshots[index][0], image))
            del snapshots[index]
        elif kind == 4 and may_resize:
            size = rng.randrange(1, 40) * 128 * 1024
            self.must(tool("resize", "-f", "qcow2", "--shrink", image, str(size)))
            return disk[:size].ljust(size, b"\0")
        else:
            self.write(tool == self.ours, image, disk, rng)
        return disk

    def write(self, by_us, image, disk, rng):
        offset = rng.randrange(len(disk) // 512) * 512
        length = min(rng.randrange(1, 800) * 512, len(disk) - offset)
        pattern = rng.randrange(256)
        if by_us:
            self.must(self.ours("bench", "-w", "-c", "1", "-d", "1", "-o", str(offset), "-s",
                                str(length), f"--pattern={pattern}", image))
        elif pattern % 3 == 0:
            self.qemu_io(image, f"write -z {offset} {length}")
            pattern = 0
        else:
            self.qemu_io(image, f"write -P {pattern} {offset} {length}")
        disk[offset:offset + length] = bytes([pattern]) * length


if __name__ == "__main__":
    main()
