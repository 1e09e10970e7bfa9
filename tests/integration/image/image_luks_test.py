#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Encrypted images, made and read by `minivmm image` and by qemu-img."""
import json
import os
import random

from image_case import SEED, ImageCase, main

SECRETS = ("--object", "secret,id=s,file=password", "--object", "secret,id=t,data=another")


def luks(name, secret="s"):
    return f"driver=luks,file.filename={name},key-secret={secret}"


class LuksCase(ImageCase):
    def setUp(self):
        super().setUp()
        with open(self.path("password"), "w", encoding="utf-8") as file:
            file.write("correct horse")
        self.fill("disk", 3 << 20, random.Random(SEED))

    def theirs_patiently(self, *arguments):
        """qemu-img measures the processor to choose a key's cost, and fails where that is too
        quick to be measured."""
        for _ in range(30):
            done = self.theirs(*arguments)
            if "Unable to get accurate CPU usage" not in done.err:
                break
        return self.must(done)

    def same_as_disk(self, options):
        """Both programs read the disk's content from the image."""
        for run in (self.ours, self.theirs):
            self.must(run("compare", *SECRETS, "--image-opts", options,
                          "driver=raw,file.filename=disk"))

    def opens(self, options):
        return self.ours("compare", *SECRETS, "--image-opts", options, options).status == 0


class LuksTest(LuksCase):
    def test_what_we_make_qemu_img_reads(self):
        ciphers = ("", ",cipher-alg=aes-128", ",cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
                   ",cipher-mode=cbc,ivgen-alg=plain,hash-alg=sha512")
        for more in ciphers:
            self.must(self.ours("convert", *SECRETS, "-O", "luks", "-o",
                                "key-secret=s,iter-time=10" + more, "disk", "x"))
            self.same_as_disk(luks("x"))
            for words in (["x"], ["--output=json", "x"], ["-f", "luks", "x"]):
                self.same_answer("info", *words, status=0)

    def test_what_qemu_img_makes_we_read(self):
        self.theirs_patiently("convert", *SECRETS, "-O", "luks", "-o",
                              "key-secret=s,iter-time=50", "disk", "x")
        self.same_as_disk(luks("x"))
        self.must(self.ours("convert", *SECRETS, "--image-opts", luks("x"), "-O", "raw", "y"))
        self.assertEqual(self.bytes_of("y"), self.bytes_of("disk"))

    def test_target_that_is_there(self):
        self.must(self.ours("create", *SECRETS, "-f", "luks", "-o", "key-secret=s,iter-time=10",
                            "x", "3M"))
        # Zeroes must be written, too: a hole of the file is noise to who decrypts it.
        self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "disk", luks("x")))
        self.same_as_disk(luks("x"))

    def test_sizes(self):
        for preallocation in ("off", "falloc", "full"):
            self.must(self.ours("create", *SECRETS, "-f", "luks", "-o",
                                f"key-secret=s,iter-time=10,preallocation={preallocation}", "x", "3M"))
            info = json.loads(self.must(self.ours("info", "--output=json", "x")).out)
            self.assertEqual(info["virtual-size"], 3 << 20)
            if preallocation != "off":
                self.assertGreaterEqual(info["actual-size"], 3 << 20)
        measured = self.must(self.ours("measure", *SECRETS, "-O", "luks", "-o", "key-secret=s",
                                       "--output=json", "--size", "3M"))
        self.assertEqual(json.loads(measured.out)["required"], os.path.getsize(self.path("x")))

    def test_passwords_are_added_and_erased(self):
        self.must(self.ours("convert", *SECRETS, "-O", "luks", "-o", "key-secret=s,iter-time=10",
                            "disk", "x"))

        def amend(secret, options, *more):
            return self.drop_in("amend", *SECRETS, *more, "--image-opts", luks("x", secret), "-o",
                                options)
        self.assertFalse(self.opens(luks("x", "t")))
        self.must(amend("s", "state=active,new-secret=t,iter-time=10"))
        self.same_as_disk(luks("x", "t"))
        self.same_as_disk(luks("x", "s"))
        self.must(amend("t", "state=inactive,old-secret=s"))
        self.assertFalse(self.opens(luks("x", "s")))
        self.same_as_disk(luks("x", "t"))
        refused = self.must(amend("t", "state=inactive,keyslot=1"), 1)
        self.assertIn("only active keyslot", refused.err)
        self.same_as_disk(luks("x", "t"))
        self.must(amend("t", "state=inactive,keyslot=1", "--force"))
        self.assertFalse(self.opens(luks("x", "t")))

    def test_amend_refuses_as_qemu_img_does(self):
        self.same_answer("amend", "disk", status=1)
        self.same_answer("amend", "-o", "size=1M", "disk", status=1)
        self.same_answer("amend", "-f", "raw", "-o", "size=1M", "disk", status=1)
        self.same_answer("amend", "-o", "size=1M", status=1)
        self.same_answer("amend", "-f", "luks", "-o", "help", status=0)

    def test_without_password(self):
        self.must(self.ours("create", *SECRETS, "-f", "luks", "-o", "key-secret=s,iter-time=10",
                            "x", "1M"))
        self.assertIn("'key-secret' is required", self.must(self.ours("map", "x"), 1).err)
        self.assertIn("No secret with id 'q'",
                      self.must(self.ours("map", "--image-opts", luks("x", "q")), 1).err)
        # In the sandbox, which GnuTLS could not be loaded in.
        self.must(self.ours("map", "--untrusted", "--output=json", *SECRETS, "--image-opts", luks("x")))
        refused = self.ours("create", "-f", "luks", "y", "1M")
        self.assertIn("'key-secret' is required", self.must(refused, 1).err)
        self.assertFalse(os.path.exists(self.path("y")))


if __name__ == "__main__":
    main()
