#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""qcow2's first encryption method, AES: images made, read and written by `minivmm image` and by
qemu-img. A sector is encrypted by its place on the disk, not in the file: what moves a cluster must
not show, what copies it to another place must."""
import os
import random

from image_case import SEED, main
from image_luks_test import SECRETS, LuksCase, qcow2

AES = "encrypt.format=aes,encrypt.key-secret=s"


class AesTest(LuksCase):
    def sound(self, name):
        self.must(self.theirs("check", *SECRETS, "--image-opts", qcow2(name)))
        self.must(self.ours("check", name))

    def test_what_we_make_qemu_img_reads(self):
        for more in ("", ",cluster_size=512", ",cluster_size=2M", ",compat=0.10",
                     ",extended_l2=on,cluster_size=16k", ",refcount_bits=1", ",data_file=d",
                     ",preallocation=full"):
            with self.subTest(options=more):
                self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o", AES + more, "disk",
                                    "x"))
                self.same_as_disk(qcow2("x"))
                self.sound("x")
                for words in (["x"], ["--output=json", "x"]):
                    self.same_answer("info", *words, status=0)
        self.same_answer("info", *SECRETS, "x", status=0)

    def test_what_qemu_img_makes_we_read_and_write(self):
        for more in ("", ",cluster_size=4k", ",extended_l2=on", ",compat=0.10"):
            with self.subTest(options=more):
                self.must(self.theirs("convert", *SECRETS, "-O", "qcow2", "-o", AES + more, "disk",
                                      "x"))
                self.same_as_disk(qcow2("x"))
                self.fill("disk", 3 << 20, random.Random(SEED + 1))
                self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "disk",
                                    qcow2("x", more=",encrypt.format=aes")))
                self.same_as_disk(qcow2("x"))
                self.sound("x")

    def test_both_write_to_an_overlay_and_its_snapshots(self):
        self.must(self.ours("create", "-q", *SECRETS, "-f", "qcow2", "-b", "disk", "-F", "raw", "-o",
                            AES + ",cluster_size=4k", "o"))
        content = bytearray(self.bytes_of("disk"))
        rng = random.Random(SEED)
        kept = None
        for turn in range(6):
            commands = []
            for _ in range(20):
                offset = rng.randrange(len(content) - 512) // 512 * 512
                length = min(rng.choice([512, 1536, 4096, 70144]), len(content) - offset)
                byte = rng.randrange(256)
                commands += ["-c", f"write -P {byte} {offset} {length}"]
                content[offset:offset + length] = bytes([byte]) * length
            self.must(self.run_in(self.folder, "qemu-io", *SECRETS, *commands, "--image-opts",
                                  qcow2("o")))
            patch = rng.randbytes(30_001)
            at = rng.randrange(len(content) - len(patch))
            content[at:at + len(patch)] = patch
            with open(self.path("now"), "wb") as file:
                file.write(content)
            self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "now", qcow2("o")))
            if turn == 2:
                kept = bytes(content)
                self.must(self.ours("snapshot", *SECRETS, "-c", "kept", "--image-opts", qcow2("o")))
            for run in (self.ours, self.theirs):
                self.must(run("compare", *SECRETS, "--image-opts", qcow2("o"),
                              "driver=raw,file.filename=now"))
            self.sound("o")
        self.must(self.ours("snapshot", *SECRETS, "-a", "kept", "--image-opts", qcow2("o")))
        with open(self.path("now"), "wb") as file:
            file.write(kept)
        for run in (self.ours, self.theirs):
            self.must(run("compare", *SECRETS, "--image-opts", qcow2("o"),
                          "driver=raw,file.filename=now"))

    def test_the_key_is_the_password_cut_or_filled_to_16_bytes(self):
        for password in ("x", "sixteen bytes ok", "more than sixteen bytes of it", "käse"):
            with self.subTest(password=password):
                secret = ("--object", f"secret,id=p,data={password}")
                options = "encrypt.format=aes,encrypt.key-secret=p"
                self.must(self.ours("convert", *secret, "-O", "qcow2", "-o", options, "disk", "x"))
                self.must(self.theirs("compare", *secret, "--image-opts", qcow2("x", "p"),
                                      "driver=raw,file.filename=disk"))

    def test_a_wrong_password_is_noise(self):
        self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o", AES, "disk", "x"))
        for run in (self.ours, self.theirs):
            self.must(run("convert", *SECRETS, "--image-opts", "-O", "raw", qcow2("x", "t"), "noise"))
            self.assertEqual(len(self.bytes_of("noise")), 3 << 20)
            self.must(run("compare", *SECRETS, "--image-opts", qcow2("x", "t"),
                          "driver=raw,file.filename=disk"), 1)
            os.rename(self.path("noise"), self.path("before"))
        self.must(self.ours("compare", *SECRETS, "--image-opts", qcow2("x", "t"),
                            "driver=raw,file.filename=before"))

    def test_the_old_name_of_the_option(self):
        self.same_answer("create", *SECRETS, "-f", "qcow2", "-o",
                         "encryption=on,encrypt.key-secret=s", "x", "1M", status=0)
        self.same_answer("info", "x", status=0)
        for options in ("encryption=on,encrypt.format=luks,encrypt.key-secret=s",
                        "encryption=on,encrypt.format=aes,encrypt.key-secret=s"):
            self.same_answer("create", *SECRETS, "-f", "qcow2", "-o", options, "y", "1M", status=1)

    def test_what_is_refused(self):
        for options in ("encryption=on", "encrypt.format=aes"):
            self.assertIn("'encrypt.key-secret' is required", self.must(self.ours(
                "create", "-f", "qcow2", "-o", options, "x", "1M"), 1).err)
            self.assertFalse(os.path.exists(self.path("x")))
        self.assertIn("cipher-alg", self.must(self.ours(
            "create", *SECRETS, "-f", "qcow2", "-o", AES + ",encrypt.cipher-alg=aes-128", "x", "1M"),
                                              1).err)
        for options in (AES, "encryption=on,encrypt.key-secret=s"):
            self.assertIn("Compression and encryption", self.must(self.ours(
                "convert", *SECRETS, "-c", "-O", "qcow2", "-o", options, "disk", "x"), 1).err)
        self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o", AES, "disk", "x"))
        self.assertIn("'encrypt.key-secret' is required", self.must(self.ours("map", "x"), 1).err)
        self.assertIn("No secret with id 'q'", self.must(self.ours(
            "map", "--image-opts", qcow2("x", "q")), 1).err)
        self.assertIn("'aes' encryption format but options specify 'luks'", self.must(self.ours(
            "map", *SECRETS, "--image-opts", qcow2("x", more=",encrypt.format=luks")), 1).err)
        self.assertIn("Only LUKS", self.must(self.ours(
            "amend", *SECRETS, "--image-opts", qcow2("x"), "-o",
            "encrypt.state=active,encrypt.new-secret=t"), 1).err)
        self.same_as_disk(qcow2("x"))

    def test_nothing_of_the_disk_is_readable_in_the_file(self):
        secret = b"a text that stands nowhere else" * 40
        with open(self.path("disk"), "r+b") as file:
            file.seek(70000)
            file.write(secret)
        self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o", AES, "disk", "x"))
        self.assertNotIn(secret[:31], self.bytes_of("x"))


if __name__ == "__main__":
    main()
