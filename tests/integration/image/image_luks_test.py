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


def qcow2(name, secret="s", more=""):
    return f"driver=qcow2,file.filename={name},encrypt.key-secret={secret}{more}"


class Qcow2Test(LuksCase):
    """Encryption inside qcow2."""

    def make_ours(self, name, *more, options=""):
        self.must(self.ours("create", "-q", *SECRETS, "-f", "qcow2", *more, "-o",
                            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" + options,
                            name, "3M"))

    def sound(self, name, secret="s"):
        self.must(self.theirs("check", *SECRETS, "--image-opts", qcow2(name, secret)))
        self.must(self.ours("check", name))

    def write_randomly(self, rng, options, backend, content, times=40):
        """Random writes and zeroes by qemu-io, or by ours in its place; `content` follows."""
        for _ in range(times):
            offset = rng.randrange(len(content) - 512) // 512 * 512
            length = min(rng.choice([512, 4096, 70000 // 512 * 512, 1536]), len(content) - offset)
            byte = rng.randrange(256)
            backend(offset, length, byte)
            content[offset:offset + length] = bytes([byte]) * length

    def io(self, options, commands):
        words = [word for command in commands for word in ("-c", command)]
        self.must(self.run_in(self.folder, "qemu-io", *SECRETS, *words, "--image-opts", options))

    def test_what_we_make_qemu_img_reads(self):
        for more in ("", ",cluster_size=512", ",cluster_size=2M", ",compat=0.10",
                     ",extended_l2=on,cluster_size=16k", ",encrypt.cipher-mode=cbc,"
                     "encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256", ",refcount_bits=1"):
            self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o",
                                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" +
                                more, "disk", "x"))
            self.same_as_disk(qcow2("x"))
            self.sound("x")
            for words in (["x"], ["--output=json", "x"]):
                self.same_answer("info", *words, status=0)

    def test_what_qemu_img_makes_we_read_and_write(self):
        self.theirs_patiently("convert", *SECRETS, "-O", "qcow2", "-o",
                              "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=50",
                              "disk", "x")
        self.same_as_disk(qcow2("x"))
        # Written over, in place and anew: what is stored now is ours.
        self.fill("disk", 3 << 20, random.Random(SEED + 1))
        self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "disk", qcow2("x")))
        self.same_as_disk(qcow2("x"))
        self.sound("x")

    def test_nothing_of_the_disk_is_readable_in_the_file(self):
        secret = b"a text that stands nowhere else" * 40
        with open(self.path("disk"), "r+b") as file:
            file.seek(70000)
            file.write(secret)
        self.must(self.ours("convert", *SECRETS, "-O", "qcow2", "-o",
                            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                            "disk", "x"))
        self.assertNotIn(secret[:31], self.bytes_of("x"))
        # Nor does map say that it could be read there.
        ranges = json.loads(self.must(self.ours("map", "--output=json", *SECRETS, "--image-opts",
                                                qcow2("x"))).out)
        self.assertTrue(any(r["data"] for r in ranges))
        self.assertFalse(any("offset" in r for r in ranges))

    def test_overlay_copies_what_it_shows(self):
        """Copy-on-write from a backing file that is not encrypted, and from an encrypted one."""
        for options in ("", ",extended_l2=on,cluster_size=32k"):
            self.make_ours("o", "-b", "disk", "-F", "raw", options=options)
            content = bytearray(self.bytes_of("disk"))
            commands = []
            rng = random.Random(SEED)
            self.write_randomly(rng, None, lambda at, n, byte: commands.append(
                f"write -P {byte} {at} {n}"), content)
            self.io(qcow2("o"), commands)
            # The same on top of it, through ours: partial sectors are read, changed and written.
            patch = rng.randbytes(100_001)
            with open(self.path("patched"), "wb") as file:
                content[300_003:300_003 + len(patch)] = patch
                file.write(content)
            self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "patched",
                                qcow2("o")))
            for run in (self.ours, self.theirs):
                self.must(run("compare", *SECRETS, "--image-opts", qcow2("o"),
                              "driver=raw,file.filename=patched"))
            self.sound("o")

    def test_passwords(self):
        self.make_ours("x")
        self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "disk", qcow2("x")))
        wrong = self.must(self.ours("map", *SECRETS, "--image-opts", qcow2("x", "t")), 1)
        self.assertIn("filename=x", wrong.err)
        self.assertIn("'encrypt.key-secret' is required", self.must(self.ours("map", "x"), 1).err)

        def amend(secret, options):
            return self.drop_in("amend", *SECRETS, "--image-opts", qcow2("x", secret), "-o", options)
        self.must(amend("s", "encrypt.state=active,encrypt.new-secret=t,encrypt.iter-time=10"))
        self.same_as_disk(qcow2("x", "t"))
        self.must(amend("t", "encrypt.state=inactive,encrypt.old-secret=s"))
        self.assertFalse(self.opens(qcow2("x", "s")))
        self.same_as_disk(qcow2("x", "t"))
        self.sound("x", "t")

    def test_resized(self):
        self.make_ours("x")
        self.must(self.ours("convert", *SECRETS, "-n", "--target-image-opts", "disk", qcow2("x")))
        self.must(self.ours("resize", *SECRETS, "--image-opts", qcow2("x"), "--shrink", "1000448"))
        self.must(self.ours("resize", *SECRETS, "--image-opts", qcow2("x"), "3M"))
        with open(self.path("disk"), "r+b") as file:
            file.truncate(1000448)
            file.truncate(3 << 20)
        self.same_as_disk(qcow2("x"))
        self.sound("x")

    def test_what_is_refused(self):
        self.assertIn("Compression and encryption", self.must(self.ours(
            "convert", *SECRETS, "-c", "-O", "qcow2", "-o",
            "encrypt.format=luks,encrypt.key-secret=s", "disk", "x"), 1).err)
        self.assertFalse(os.path.exists(self.path("x")))
        self.assertIn("'encrypt.format' is missing", self.must(self.ours(
            "create", *SECRETS, "-f", "qcow2", "-o", "encrypt.key-secret=s", "x", "1M"), 1).err)
        self.assertFalse(os.path.exists(self.path("x")))
        self.make("-f", "qcow2", "plain", "1M")
        self.assertIn("No encryption in image header", self.must(self.ours(
            "map", *SECRETS, "--image-opts", qcow2("plain")), 1).err)

    def test_measured(self):
        words = ["measure", *SECRETS, "-O", "qcow2", "-o",
                 "encrypt.format=luks,encrypt.key-secret=s", "--size", "10M"]
        theirs = self.theirs_patiently(*words)
        self.assertEqual(self.must(self.drop_in(*words)).out, theirs.out)

    def test_hostile_headers(self):
        self.make_ours("good")
        good = self.bytes_of("good")
        at = good.index((0x0537be77).to_bytes(4, "big"))

        def refused(offset, value):
            with open(self.path("bad"), "wb") as file:
                file.write(good[:offset] + value + good[offset + len(value):])
            for words in (["map", *SECRETS, "--image-opts", qcow2("bad")], ["info", "bad"],
                          ["check", "bad"]):
                result = self.must(self.ours(*words), 1)
                self.assertIn("minivmm: ", result.err)
        refused(at, b"\x11\x11\x11\x11")                          # no such extension
        refused(at + 8, (1 << 62).to_bytes(8, "big"))             # past the end
        refused(at + 8, (512).to_bytes(8, "big"))                 # not aligned
        refused(at + 8, bytes(8))                                 # in the header
        refused(at + 16, bytes(8))                                # empty
        refused(at + 16, (1 << 63).to_bytes(8, "big"))            # wraps
        refused(24, (3 * 1024 * 1024 + 1).to_bytes(8, "big"))     # an odd size
        refused(32, (0).to_bytes(4, "big"))                       # the extension contradicts


if __name__ == "__main__":
    main()
