# SPDX-License-Identifier: Apache-2.0
"""`minivmm image convert` and `dd`: what they make is what qemu-img reads, and the reverse."""
import os
import random
import re
import signal
import subprocess
import time

from image_case import MINIVMM, SEED, ImageCase, main

FORMATS = ("raw", "qcow2")


class Convert(ImageCase):
    def same_content(self, a, b, *options):
        self.must(self.theirs("compare", *options, a, b))
        self.must(self.ours("compare", *options, a, b))

    def test_every_direction_keeps_the_content_and_qemu_img_reads_it(self):
        rng = random.Random(SEED)
        for number in range(12):
            size = rng.choice([512 * rng.randint(1, 40_000), 3 << 20, rng.randint(1, 9 << 20)])
            self.fill("source.raw", size, rng)
            made = self.theirs if rng.random() < 0.5 else self.ours
            self.must(made("convert", "-f", "raw", "-O", "qcow2", "source.raw", "source.qcow2"))
            for source in FORMATS:
                for target in FORMATS:
                    options = []
                    if target == "qcow2" and rng.random() < 0.6:
                        cluster = rng.choice(["512", "4k", "64k", "2M"])
                        options = ["-o", f"cluster_size={cluster}"]
                        if cluster == "64k":
                            options[1] += f",extended_l2={rng.choice(['on', 'off'])}"
                    if rng.random() < 0.3:
                        options += ["-S", rng.choice(["0", "512", "64k", "12k"])]
                    if rng.random() < 0.3:
                        options += ["-m", str(rng.randint(1, 16)), "-W"]
                    with self.subTest(seed=SEED, number=number, source=source, target=target,
                                      options=options, size=size):
                        self.must(self.ours("convert", "-f", source, "-O", target, *options,
                                            f"source.{source}", "target"))
                        self.same_content("source.raw", "target", "-f", "raw", "-F", target)
                        if target == "qcow2":
                            self.must(self.theirs("check", "target"))
                        os.unlink(self.path("target"))

    def test_compressed(self):
        rng = random.Random(SEED)
        with open(self.path("in"), "wb") as file:  # half of it can be compressed
            for _ in range(40):
                file.write(rng.randbytes(60_000))
                file.write(bytes([rng.randrange(1, 256)]) * 60_000)
        for options in ("compression_type=zlib", "compression_type=zstd",
                        "compression_type=zlib,cluster_size=4k", "cluster_size=2M,compat=0.10",
                        "compression_type=zstd,cluster_size=64k,extended_l2=on",
                        "cluster_size=64k,refcount_bits=1"):
            with self.subTest(options=options, seed=SEED):
                self.must(self.ours("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options,
                                    "in", "ours"))
                self.must(self.theirs("check", "-f", "qcow2", "ours"))
                self.same_content("in", "ours", "-f", "raw", "-F", "qcow2")
                # (Few clusters, most of them tables; or none that two could share.)
                if "2M" not in options and "refcount_bits=1" not in options:
                    self.assertLess(os.stat(self.path("ours")).st_size, 3_600_000)
                self.must(self.theirs("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options,
                                      "in", "theirs"))
                self.must(self.ours("convert", "-c", "-O", "qcow2", "-o", options, "theirs",
                                    "again"))
                self.same_content("in", "again", "-f", "raw", "-F", "qcow2")
        done = self.ours("convert", "-c", "-f", "raw", "-O", "raw", "in", "no")
        self.must(done, 1)
        self.assertIn("Compression not supported for this file format", done.err)

    def test_zeroes_take_no_room(self):
        rng = random.Random(SEED)
        with open(self.path("source"), "wb") as file:
            file.write(rng.randbytes(65536) + bytes(8 << 20) + rng.randbytes(4096))
        for target in FORMATS:
            self.must(self.ours("convert", "-f", "raw", "-O", target, "source", "ours"))
            self.must(self.theirs("convert", "-f", "raw", "-O", target, "source", "theirs"))
            ours, theirs = (os.stat(self.path(n)).st_blocks * 512 for n in ("ours", "theirs"))
            self.assertLess(ours, theirs + 131072)
            os.unlink(self.path("ours"))
        self.must(self.ours("convert", "-f", "raw", "-S", "0", "-O", "raw", "source", "full"))
        self.assertGreater(os.stat(self.path("full")).st_blocks * 512, 8 << 20)

    def test_files_follow_each_other(self):
        rng = random.Random(SEED)
        self.fill("a", 1 << 20, rng)
        self.fill("b", 700_000, rng)
        self.must(self.ours("convert", "-f", "raw", "-O", "qcow2", "a", "b", "a", "ours"))
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "a", "b", "a", "theirs"))
        self.same_content("ours", "theirs")

    def chain(self):
        """base <- middle <- top, each with something of its own."""
        rng = random.Random(SEED)
        self.fill("base.raw", 4 << 20, rng)
        self.must(self.theirs("convert", "-f", "raw", "-O", "qcow2", "base.raw", "base"))
        for below, name in (("base", "middle"), ("middle", "top")):
            self.make("-f", "qcow2", "-b", below, "-F", "qcow2", name)
            self.qemu_io(name, f"write -P 7 {rng.randrange(60) * 64}k 100k",
                         f"write -z {rng.randrange(60) * 64}k 128k")

    def test_a_chain_becomes_one_image(self):
        self.chain()
        self.must(self.ours("convert", "-O", "raw", "top", "flat"))
        self.must(self.theirs("compare", "-f", "qcow2", "-F", "raw", "top", "flat"))

    def test_with_a_backing_file_only_what_is_above_it_is_copied(self):
        self.chain()
        for below in ("base", "middle"):
            self.must(self.ours("convert", "-O", "qcow2", "-B", below, "-F", "qcow2", "top", "out"))
            self.must(self.theirs("compare", "top", "out"))
            self.must(self.theirs("check", "out"))
            self.assertLess(os.stat(self.path("out")).st_blocks, 3000)
            os.unlink(self.path("out"))

    def test_into_an_image_that_is_there(self):
        rng = random.Random(SEED)
        self.fill("source", 2 << 20, rng)
        self.make("-f", "qcow2", "there", "3M")
        self.qemu_io("there", "write -P 9 0 3M")
        self.must(self.ours("convert", "-n", "-f", "raw", "-O", "qcow2", "source", "there"))
        self.must(self.run_in(self.folder, "qemu-io", "-f", "qcow2", "-c", "read -P 9 2M 1M",
                              "there"))
        with open(self.path("source"), "r+b") as file:
            file.truncate(3 << 20)
            file.seek(2 << 20)
            file.write(b"\x09" * (1 << 20))
        self.same_content("source", "there", "-f", "raw", "-F", "qcow2")
        self.make("-f", "raw", "small", "1M")
        # Nothing was written to it, so nothing is said of it but that.
        self.same_answer("convert", "-n", "-f", "raw", "-O", "raw", "source", "small", status=1)

    def test_image_opts(self):
        rng = random.Random(SEED)
        self.fill("source", 1 << 20, rng)
        self.must(self.ours("convert", "--image-opts", "-O", "qcow2",
                            "driver=raw,file.driver=file,file.filename=source", "a"))
        self.make("-f", "qcow2", "b", "1M")
        self.must(self.ours("convert", "-n", "--target-image-opts", "--target-is-zero", "-f", "raw",
                            "source", "driver=qcow2,file.filename=b"))
        self.same_content("a", "b")
        self.same_content("source", "b", "-f", "raw", "-F", "qcow2")

    def test_wrong_calls_are_told_as_qemu_img_tells_them(self):
        self.make("-f", "qcow2", "a", "1M")
        for arguments in (["a"], [], ["-f"], ["-S", "3", "a", "c"], ["-S", "x", "a", "c"],
                          ["-m", "0", "a", "c"], ["-m", "20", "a", "c"], ["-n", "a", "nofile"],
                          ["-t", "bad", "a", "c"], ["-T", "bad", "a", "c"], ["a", "a"],
                          ["-O", "qcow2", "-o", "frob=1", "a", "c"], ["a", "nodir/c"],
                          ["-C", "-S", "4k", "a", "c"], ["-C", "-c", "-O", "qcow2", "a", "c"],
                          ["-r", "x", "a", "c"], ["--target-is-zero", "a", "c"],
                          ["--target-image-opts", "a", "c"], ["-n", "-o", "x=y", "a", "c"],
                          ["-O", "raw", "-B", "a", "a", "c"], ["-c", "-O", "raw", "a", "c"],
                          ["-B", "a", "-O", "qcow2", "a", "c"], ["--frob", "a", "b"], ["no", "c"],
                          ["-F", "raw", "-O", "qcow2", "a", "c"]):
            with self.subTest(arguments=arguments):
                self.same_answer("convert", *arguments, status=1)

    def test_progress(self):
        rng = random.Random(SEED)
        self.fill("source", 4 << 20, rng)
        out = self.must(self.ours("convert", "-p", "-f", "raw", "source", "target")).out
        self.assertRegex(out, r"\A(    \(\d+\.\d\d/100%\)\r)*    \(100\.00/100%\)\r\n\Z")
        self.assertEqual(self.must(self.ours("convert", "-p", "-q", "-f", "raw", "source",
                                             "target")).out, "")

    def test_usr1_asks_how_far_it_is_and_int_leaves_nothing_half_done(self):
        with open(self.path("source"), "wb") as file:
            file.write(b"x" * (8 << 20))
        for there in (False, True):
            process = subprocess.Popen([MINIVMM, "image", "convert", "-r", "1M", "-f", "raw",
                                        "source", "target"], cwd=self.folder,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            time.sleep(0.7)
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
            # By the signal, so that a shell's loop ends as well.
            self.assertEqual(process.returncode, -signal.SIGINT)
            found = re.search(r"    \((\d+\.\d\d)/100%\)\n", err.decode())
            self.assertTrue(found and 0 < float(found[1]) < 90, err)
            self.assertIn("the copy was stopped", err.decode())
            if there:
                self.assertIn("target: is incomplete", err.decode())
            else:
                self.assertIn("target: was not completed, and has been removed", err.decode())
                self.assertFalse(os.path.exists(self.path("target")))
            self.must(self.theirs("create", "-q", "target", "1M"))

    def test_a_terminal_gets_a_bar_and_a_script_does_not(self):
        rng = random.Random(SEED)
        self.fill("source", 4 << 20, rng)
        self.must(self.drop_in("--version"))
        drop_in = self.path(".bin", "qemu-img")
        for command, bar in (([MINIVMM, "image", "convert"], True),
                             ([MINIVMM, "image", "convert", "-q"], False),
                             ([MINIVMM, "image", "convert", "-p"], False),
                             ([drop_in, "convert"], False)):
            ours, theirs = os.openpty()
            done = subprocess.run([*command, "-f", "raw", "source", "target"], cwd=self.folder,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
                                  timeout=60, check=True)
            os.close(theirs)
            told = b""
            try:
                while piece := os.read(ours, 4096):
                    told += piece
            except OSError:  # EIO: nobody has the other end any more
                pass
            os.close(ours)
            if bar:
                self.assertRegex(told.decode(), r"\[#{30}\] 100\.0%.*\n\Z")
            else:
                self.assertEqual(told, b"")
            self.assertEqual(b"(100.00/100%)" in done.stdout, "-p" in command)

    def test_a_target_that_is_not_finished_is_named(self):
        # The target's file system is full: a file size limit does for it.
        with open(self.path("source"), "wb") as file:
            file.write(b"x" * (4 << 20))
        done = self.must(self.run_in(
            self.folder, "bash", "-c",
            f"trap '' XFSZ; ulimit -f 1024; exec {MINIVMM} image convert -f raw source target"), 1)
        self.assertIn("target", done.err)
        self.assertFalse(os.path.exists(self.path("target")))

    def test_dd(self):
        rng = random.Random(SEED)
        self.fill("source", 1_000_000, rng)
        for number, operands in enumerate((["bs=4k", "count=20"], ["skip=7"],
                                           ["bs=1000", "count=11"], ["count=0"],
                                           ["bs=64k", "skip=999"], [])):
            for target in FORMATS:
                with self.subTest(operands=operands, target=target):
                    answers = [run("dd", "-f", "raw", "-O", target, *operands, "if=source",
                                   f"of={name}{number}")
                               for name, run in (("a", self.drop_in), ("b", self.theirs))]
                    self.assertEqual(answers[0].status, answers[1].status)
                    self.assertEqual(answers[0].err, answers[1].err)
                    if answers[1].status == 0:
                        self.same_content(f"a{number}", f"b{number}", "-f", target, "-F",
                                          target)
                    for name in ("a", "b"):
                        if os.path.exists(self.path(f"{name}{number}")):
                            os.unlink(self.path(f"{name}{number}"))

    def test_count_is_of_what_is_copied(self):
        # As it is documented; qemu-img 7.2 counts what is skipped as well.
        with open(self.path("source"), "wb") as file:
            file.write(b"".join(bytes([i]) * 512 for i in range(20)))
        self.must(self.ours("dd", "-f", "raw", "skip=3", "count=2", "if=source", "of=out"))
        self.assertEqual(self.bytes_of("out"), bytes([3]) * 512 + bytes([4]) * 512)

    def test_wrong_calls_of_dd(self):
        self.make("-f", "raw", "a", "1M")
        for operands in ([], ["if=a"], ["if=a", "of=d", "frob=1"], ["if=a", "of=d", "bs=0"],
                         ["if=a", "of=d", "bs=x"], ["if=no", "of=d"], ["if=a", "of=d", "count=x"],
                         ["a"], ["-n", "if=a", "of=d"], ["if=a", "of=d", "skip=" + 20 * "9"]):
            with self.subTest(operands=operands):
                self.same_answer("dd", *operands, status=1)


if __name__ == "__main__":
    main()
