# SPDX-License-Identifier: Apache-2.0
"""`minivmm image info` beside `qemu-img info`."""
import json
import os
import random
import struct

from image_case import SEED, ImageCase, main


def typed(value):
    """JSON with its types: Python holds 1 and True for equal."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value).__name__, value)


class Info(ImageCase):
    def compare(self, *arguments):
        """Both outputs of both programs, word for word; returns ours as a value."""
        human = self.must(self.ours("info", *arguments))
        self.assertEqual(human.out, self.must(self.theirs("info", *arguments)).out)
        ours = json.loads(self.must(self.ours("info", "--output=json", *arguments)).out)
        theirs = json.loads(self.must(self.theirs("info", "--output=json", *arguments)).out)
        self.assertEqual(typed(ours), typed(theirs))
        return ours

    def test_images_that_qemu_img_made(self):
        self.make("-f", "qcow2", "base", "3G")
        grid = [
            ("plain", []),
            ("v2", ["-o", "compat=0.10"]),
            ("small", ["-o", "cluster_size=512,refcount_bits=1"]),
            ("large", ["-o", "cluster_size=2M,refcount_bits=64"]),
            ("lazy", ["-o", "lazy_refcounts=on,compression_type=zstd"]),
            ("subclusters", ["-o", "extended_l2=on"]),
            ("data", ["-o", "data_file=data.raw"]),
            ("rawdata", ["-o", "data_file=data2.raw,data_file_raw=on"]),
            ("full", ["-o", "preallocation=full"]),
            ("overlay", ["-b", "base", "-F", "qcow2"]),
        ]
        for name, arguments in grid:
            with self.subTest(name=name):
                self.make("-f", "qcow2", *arguments, name, "2M")
                self.compare(name)

    def test_images_that_we_made(self):
        for number, options in enumerate(["compat=0.10", "cluster_size=4k,refcount_bits=8",
                                          "preallocation=metadata", "compression_type=zstd"]):
            name = f"ours{number}"
            self.must(self.ours("create", "-f", "qcow2", "-o", options, name, "5M"))
            self.compare(name)

    def test_raw_images(self):
        self.make("-f", "raw", "plain", "3M")
        self.compare("plain")
        self.compare("-f", "raw", "plain")
        with open(self.path("odd"), "wb") as file:
            file.write(b"x" * 1000)
        self.assertEqual(self.compare("odd")["virtual-size"], 1024)
        # A format that is stated is believed.
        self.make("-f", "qcow2", "image", "3M")
        self.assertEqual(self.compare("-f", "raw", "image")["format"], "raw")

    def test_sizes_are_written_as_qemu_img_does(self):
        for size in [0, 512, 999 * 1024, 1000 * 1024, 1023 << 20, 1 << 40, (1 << 40) * 999,
                     123456789 * 512]:
            with self.subTest(size=size):
                self.make("-f", "qcow2", "-o", "cluster_size=2M", "x", str(size))
                self.compare("x")

    def test_dirty_and_corrupt_bits(self):
        for bit in (1, 2, 3):
            self.make("-f", "qcow2", "x", "1M")
            with open(self.path("x"), "r+b") as file:
                file.seek(79)
                file.write(bytes([bit]))
            self.compare("x")

    def test_snapshots_and_bitmaps(self):
        self.make("-f", "qcow2", "x", "1M")
        self.must(self.theirs("snapshot", "-c", "first", "x"))
        self.must(self.theirs("snapshot", "-c", "a name longer than its column", "x"))
        self.must(self.theirs("bitmap", "--add", "x", "zero"))
        self.must(self.theirs("bitmap", "--add", "--disable", "-g", "512", "x", "one"))
        self.compare("x")
        # VM state, a clock that ran, no instruction count: what only a machine's snapshot has.
        with open(self.path("x"), "r+b") as file:
            file.seek(64)
            table = struct.unpack(">Q", file.read(8))[0]
            file.seek(table + 24)
            file.write(struct.pack(">Q", (3 * 3600 + 25 * 60 + 7) * 10**9 + 123456789))
            file.seek(table + 40)
            file.write(struct.pack(">Q", 777777777))
            file.seek(table + 56)
            file.write(b"\xff" * 8)
        self.compare("x")

    def test_encrypted_image_is_named_as_such(self):
        # qemu-img measures the processor to choose a key's cost, and fails where that is too quick
        # to be measured.
        for _ in range(20):
            made = self.theirs("create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2",
                               "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=50",
                               "x", "1M")
            if made.status == 0:
                break
        self.must(made)
        ours = json.loads(self.must(self.ours("info", "--output=json", "x")).out)
        self.assertIs(ours["encrypted"], True)
        self.assertEqual(ours["format-specific"]["data"]["encrypt"]["format"], "luks")
        self.assertIn("encrypted: yes\n", self.ours("info", "x").out)

    def test_backing_chain(self):
        os.mkdir(self.path("sub"))
        self.make("-f", "raw", "sub/base", "1M")
        self.make("-f", "qcow2", "-b", "base", "-F", "raw", "sub/middle")
        self.make("-f", "qcow2", "-b", "middle", "-F", "qcow2", "sub/top", "5M")
        chain = self.compare("--backing-chain", "sub/top")
        self.assertEqual([link["filename"] for link in chain],
                         ["sub/top", "sub/middle", "sub/base"])
        self.compare("--backing-chain", self.path("sub/top"))
        self.compare("sub/top")
        self.assertEqual(len(self.compare("--backing-chain", "sub/base")), 1)

    def test_opens_no_file_that_the_image_names_unless_asked(self):
        # The name leads to a pipe: opening it would hang, and the test with it.
        os.mkfifo(self.path("pipe"))
        self.make("-f", "qcow2", "-u", "-b", "pipe", "-F", "raw", "x", "1M")
        self.must(self.ours("info", "x"))
        self.must(self.ours("info", "--output=json", "x"))
        done = self.must(self.ours("info", "--backing-chain", "x"), 1)
        self.assertIn("not a regular file", done.err)

    def test_chain_stays_in_the_images_own_directory_unless_allowed(self):
        os.mkdir(self.path("sub"))
        self.make("-f", "qcow2", "base", "1M")
        self.make("-f", "qcow2", "-b", self.path("base"), "-F", "qcow2", "sub/x")
        done = self.must(self.ours("info", "--backing-chain", "sub/x"), 1)
        self.assertIn("--backing-root", done.err)
        self.compare("sub/x")
        done = self.must(self.ours("info", "--backing-chain", "--backing-root", self.folder,
                                   "sub/x"))
        self.assertEqual(done.out, self.theirs("info", "--backing-chain", "sub/x").out)
        for reference in ("nbd://localhost/x", "json:{}"):
            self.make("-f", "qcow2", "-u", "-b", reference, "-F", "raw", "y", "1M")
            done = self.must(self.ours("info", "--backing-chain", "y"), 1)
            self.assertIn("not a plain file name", done.err)

    def test_chain_without_recorded_format_is_not_guessed(self):
        self.make("-f", "qcow2", "base", "1M")
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "x")
        data = self.bytes_of("x")
        with open(self.path("x"), "wb") as file:  # the extension becomes an unknown one
            file.write(data.replace(bytes.fromhex("e2792aca"), bytes.fromhex("12345678"), 1))
        done = self.must(self.ours("info", "--backing-chain", "x"), 1)
        self.assertIn("without a format", done.err)
        self.assertNotIn("backing-filename-format", self.ours("info", "--output=json", "x").out)

    def test_loop_of_backing_files_shows_the_chain(self):
        self.make("-f", "qcow2", "-u", "-b", "two", "-F", "qcow2", "one", "1M")
        self.make("-f", "qcow2", "-u", "-b", "./one", "-F", "qcow2", "two", "1M")
        done = self.must(self.ours("info", "--backing-chain", "one"), 1)
        self.assertIn("infinite loop: one -> two -> ./one", done.err)

    def test_works_on_an_image_in_use(self):
        self.make("-f", "qcow2", "x", "1M")
        with self.in_use("x"):
            plain = self.must(self.ours("info", "x"))
            self.assertEqual(plain.out, self.must(self.theirs("info", "-U", "x")).out)
            self.assertEqual(plain.out, self.must(self.ours("info", "-U", "x")).out)

    def test_names_inside_an_image_cannot_pass_for_lines_of_the_output(self):
        evil = "b\nfile format: raw\x1b[2J"
        self.make("-f", "qcow2", "-u", "-b", evil, "-F", "raw", "x", "1M")
        done = self.must(self.ours("info", "x"))
        self.assertIn("backing file: b\\x0afile format: raw\\x1b[2J\n", done.out)
        ours = json.loads(self.ours("info", "--output=json", "x").out)
        self.assertEqual(ours["backing-filename"], evil)

    def test_other_formats_are_named(self):
        self.make("-f", "vmdk", "x", "1M")
        done = self.must(self.ours("info", "x"), 1)
        self.assertIn("vmdk", done.err)
        self.must(self.ours("info", "-f", "raw", "x"))

    def test_wrong_calls(self):
        self.make("-f", "raw", "x", "1M")
        for arguments in ([], ["x", "x"], ["--output=xml", "x"], ["nope"], ["--nope", "x"],
                          ["-f", "nope", "x"], ["-f", "qcow2", "x"], [self.folder],
                          ["--image-opts", "x"], [""]):
            with self.subTest(arguments=arguments):
                done = self.must(self.ours("info", *arguments), 1)
                self.assertTrue(done.err.startswith("minivmm: "), done.err)
                self.assertEqual(done.out, "")

    def test_damaged_headers_are_an_answer_or_an_error(self):
        # Never a crash, a hang or a flood: the file is anybody's.
        rng = random.Random(SEED)
        self.make("-f", "qcow2", "base", "1G")
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "x")
        self.must(self.theirs("snapshot", "-c", "first", "x"))
        self.must(self.theirs("bitmap", "--add", "x", "bitmap"))
        good = self.bytes_of("x")
        tables = [0, struct.unpack(">Q", good[64:72])[0]]
        for number in range(150):
            image = bytearray(good)
            start = rng.choice(tables)
            for _ in range(rng.randint(1, 8)):
                image[start + rng.randrange(8, 300)] = rng.choice([0, 1, 0x7f, 0x80, 0xff,
                                                                   rng.randrange(256)])
            if rng.random() < 0.1:
                del image[rng.randrange(len(image)):]
            with open(self.path("bad"), "wb") as file:
                file.write(image)
            done = self.ours("info", rng.choice(["--output=json", "--output=human"]), "bad")
            self.assertIn(done.status, (0, 1), f"seed {SEED}, number {number}: {done}")
            # A name has at most 64 KiB, and each byte of it at most four characters.
            self.assertLess(len(done.out) + len(done.err), 1 << 20)


if __name__ == "__main__":
    main()
