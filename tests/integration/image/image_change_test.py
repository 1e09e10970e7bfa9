# SPDX-License-Identifier: Apache-2.0
"""`minivmm image resize`, `rebase`, `commit` and `bench` beside qemu-img's."""
import json
import os
import random
import shutil
import signal
import subprocess
import time

from image_case import MINIVMM, SEED, ImageCase, main


class Resize(ImageCase):
    def test_raw_files_and_answers(self):
        for arguments, status in ((["2M"], 0), (["+1M"], 0), (["1M"], 1), (["-1M"], 1),
                                  (["--shrink", "1M"], 0), (["--shrink", "-512k"], 0),
                                  (["0"], 1), (["x"], 1), (["--shrink", "-50M"], 1), (["+0"], 0),
                                  (["-q", "4M"], 0), (["--preallocation=foo", "5M"], 1),
                                  (["--preallocation=falloc", "5M"], 0),
                                  (["--preallocation=full", "6M"], 0), (["6000001"], 1),
                                  (["--shrink", "6000001"], 0),
                                  (["--preallocation=full", "--shrink", "1M"], 1)):
            with self.subTest(arguments=arguments):
                if not os.path.exists(self.path("a")):
                    for name in "ab":
                        self.make("-f", "raw", name, "1M")
                *options, size = arguments
                # The name is in no answer but the warning about guessed formats.
                ours = self.must(self.drop_in("resize", "-f", "raw", *options, "a", size), status)
                theirs = self.theirs("resize", "-f", "raw", *options, "b", size)
                self.assertEqual((ours.status, ours.out, ours.err),
                                 (theirs.status, theirs.out, theirs.err))
                self.assertEqual(os.stat(self.path("a")).st_size, os.stat(self.path("b")).st_size)
                if "prealloc" in arguments[0] and status == 0:
                    self.assertGreaterEqual(os.stat(self.path("a")).st_blocks * 512, 1 << 20)

    def test_qcow2(self):
        # Turn by turn with qemu-img, the content kept, the rest zeroes, nothing leaked.
        rng = random.Random(SEED)
        for options in ([], ["-o", "cluster_size=512"], ["-o", "compat=0.10,cluster_size=4k"],
                        ["-o", "extended_l2=on,cluster_size=16k"],
                        ["-o", "lazy_refcounts=on,refcount_bits=1"]):
            with self.subTest(options=options, seed=SEED):
                self.fill("old", 1 << 20, rng)
                self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", *options, "old", "a"))
                for arguments in (["20M"], ["--preallocation=metadata", "+3M"],
                                  ["--preallocation=falloc", "+1536k"], ["--shrink", "1M"],
                                  ["--preallocation=full", "+2M"], ["+40M"]):
                    self.must(self.ours("resize", "-q", "-f", "qcow2", *arguments[:-1], "a",
                                        arguments[-1]))
                    self.must(self.theirs("check", "-f", "qcow2", "a"))
                    self.must(self.theirs("resize", "-q", "-f", "qcow2", "a", "+512k"))
                    self.must(self.theirs("check", "-f", "qcow2", "a"))
                    # What is longer must be zeroes.
                    self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "old", "a"))
                    self.must(self.ours("compare", "-f", "raw", "-F", "qcow2", "old", "a"))

    def test_wrong_calls(self):
        self.make("-f", "raw", "a", "1M")
        for arguments in ([], ["a"], ["no", "1M"], ["a", "2M"]):
            self.same_answer("resize", *arguments)


class Bench(ImageCase):
    def test_answers(self):
        self.make("-f", "raw", "a", "1M")
        for arguments in (["-c", "10"], ["-w", "-c", "5", "-d", "2", "-s", "8k"],
                          ["-w", "--flush-interval", "2", "-c", "8", "-d", "2"],
                          ["-o", "64k", "-S", "8k", "-c", "5"], ["-t", "none", "-c", "2"]):
            ours = self.must(self.drop_in("bench", "-f", "raw", *arguments, "a")).out.splitlines()
            theirs = self.must(self.theirs("bench", "-f", "raw", *arguments, "a")).out.splitlines()
            self.assertEqual(ours[:-1], theirs[:-1])
            self.assertRegex(ours[-1], r"\ARun completed in \d+\.\d{3} seconds\.\Z")
        for arguments in (["-c", "x", "a"], ["-s", "x", "a"], ["--flush-interval", "2", "a"],
                          ["--pattern", "300", "a"], [], ["-o", "x", "a"]):
            self.same_answer("bench", *arguments, status=1)


class Chain(ImageCase):
    def setUp(self):
        super().setUp()
        self.rng = random.Random(SEED)
        self.fill("base.raw", 3 << 20, self.rng)
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "base.raw", "base"))
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "middle")
        self.make("-f", "qcow2", "-b", "middle", "-F", "qcow2", "top", "4M")
        for name in ("middle", "top"):
            self.scribble(name)

    def scribble(self, name, times=6):
        for number in range(times):
            at = self.rng.randrange(2_900_000)
            self.qemu_io(name, f"write {'-z' if number % 3 == 0 else '-P 5'} {at} "
                         f"{self.rng.randint(1, 90000)}")

    def backing_of(self, name):
        info = json.loads(self.must(self.theirs("info", "-U", "--output=json", name)).out)
        return info.get("backing-filename"), info.get("backing-filename-format")

    def flatten(self, name, out):
        self.must(self.theirs("convert", "-O", "raw", name, out))

    def check(self, *names):
        for name in names:
            self.must(self.theirs("check", name))

    def test_rebase_keeps_the_content(self):
        self.flatten("top", "before")
        shutil.copy(self.path("base"), self.path("other"))
        self.scribble("other")
        for new in ("base", "other", "", "other", "middle"):
            arguments = ["-b", new] + (["-F", "qcow2"] if new else [])
            with self.subTest(seed=SEED, new=new):
                self.must(self.ours("rebase", *arguments, "top"))
                self.check("top")
                self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "top"))
                self.assertEqual(self.backing_of("top"), (new, "qcow2") if new else (None, None))

    def test_rebase_onto_what_is_below_copies_only_what_is_between(self):
        shutil.copy(self.path("top"), self.path("theirs"))
        self.must(self.ours("rebase", "-b", "base", "-F", "qcow2", "top"))
        self.must(self.theirs("rebase", "-b", "base", "-F", "qcow2", "theirs"))
        self.must(self.theirs("compare", "top", "theirs"))
        self.assertLess(os.stat(self.path("top")).st_blocks,
                        os.stat(self.path("theirs")).st_blocks * 1.2 + 256)

    def test_rebase_with_large_clusters_over_small_differences(self):
        # A part of a cluster differs: the whole one must come from the old backing file.
        self.make("-f", "qcow2", "-o", "cluster_size=2M", "-b", "base", "-F", "qcow2", "wide")
        shutil.copy(self.path("base"), self.path("other"))
        self.qemu_io("other", "write -P 77 1000k 1k")
        self.flatten("wide", "before")
        self.must(self.ours("rebase", "-b", "other", "-F", "qcow2", "wide"))
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "wide"))

    def test_unsafe_rebase_changes_the_name_alone(self):
        before = self.bytes_of("top")
        self.must(self.ours("rebase", "-u", "-b", "nowhere", "-F", "raw", "top"))
        self.assertEqual(self.backing_of("top"), ("nowhere", "raw"))
        self.assertEqual(before[65536:], self.bytes_of("top")[65536:])
        self.must(self.ours("rebase", "-u", "-b", "middle", "-F", "qcow2", "top"))
        self.check("top")

    def test_wrong_calls_of_rebase(self):
        self.make("-f", "raw", "plain", "1M")
        for arguments in (["top"], ["-F", "qcow2", "top"], ["-b", "no", "-F", "qcow2", "top"],
                          ["-b", "base", "top"], ["-u", "-b", "base", "top"],
                          ["-t", "bad", "-b", "base", "top"], ["-b", "base", "-F", "qcow2", "no"],
                          ["-f", "raw", "-b", "base", "-F", "qcow2", "plain"]):
            with self.subTest(arguments=arguments):
                before = self.bytes_of("top")
                self.must(self.drop_in("rebase", *arguments), 1)
                # qemu-img copies first and fails then.
                self.assertEqual(before, self.bytes_of("top"))
                self.same_answer("rebase", *arguments, status=1)

    def test_commit(self):
        # The overlay is not larger than its backing file here.
        self.flatten("middle", "before")
        self.assertEqual(self.same_bytes("commit", "middle").out, "Image committed.\n")
        self.check("base", "middle")
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "base"))
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "middle"))
        self.assertLess(os.stat(self.path("middle")).st_size, 1 << 20, "it is empty again")
        self.assertEqual(self.backing_of("middle"), ("base", "qcow2"))

    def same_bytes(self, *arguments):
        return self.must(self.drop_in(*arguments))

    def test_a_commit_that_is_interrupted_says_so_and_keeps_the_overlay(self):
        self.qemu_io("top", "write -P 7 0 4M")
        self.flatten("top", "before")
        process = subprocess.Popen([MINIVMM, "image", "commit", "-r", "1M", "top"],
                                   cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        self.assertEqual(process.returncode, -signal.SIGINT)
        self.assertEqual(out, b"")
        self.assertIn("The commit was not completed; the overlay is unchanged", err.decode())
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "top"))
        self.check("top", "middle", "base")

    def test_commit_of_the_whole_chain(self):
        self.make("-f", "qcow2", "-b", "middle", "-F", "qcow2", "third")
        self.scribble("third")
        self.flatten("third", "before")
        self.must(self.ours("commit", "-b", "base", "third"))
        self.check("base", "third")
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "base"))
        self.must(self.theirs("compare", "-f", "raw", "-F", "qcow2", "before", "third"))

    def test_commit_that_drops_the_overlay_leaves_it_as_it_is(self):
        before = self.bytes_of("middle")
        self.must(self.ours("commit", "-q", "-d", "middle"))
        self.assertEqual(before, self.bytes_of("middle"))

    def test_an_overlay_with_snapshots_is_not_emptied(self):
        self.must(self.theirs("snapshot", "-c", "kept", "middle"))
        before = self.bytes_of("middle")
        self.assertIn("could not be emptied", self.must(self.ours("commit", "middle")).err)
        self.assertEqual(before, self.bytes_of("middle"))

    def test_wrong_calls_of_commit(self):
        for arguments in (["base"], [], ["-b", "no", "top"], ["-t", "bad", "top"], ["no"],
                          ["-r", "1x", "top"]):
            with self.subTest(arguments=arguments):
                self.same_answer("commit", *arguments, status=1)


if __name__ == "__main__":
    main()
