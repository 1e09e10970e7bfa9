# SPDX-License-Identifier: Apache-2.0
"""Images are not trusted: what commands that read them cannot do, and what names they go by."""
import json
import os
import shutil
import struct
import subprocess
import sys

from image_case import ImageCase, main


# renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE), for ever.
SWAP = """
import ctypes, os, sys
call = ctypes.CDLL(None, use_errno=True).renameat2
a, b = (os.fsencode(name) for name in sys.argv[1:])
print(flush=True)
while True:
    call(-100, a, -100, b, 2)
"""


class Sandbox(ImageCase):
    def setUp(self):
        super().setUp()
        self.make("-f", "qcow2", "base", "1M")
        self.make("-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay")
        self.qemu_io("overlay", "write 0 64k")

    def traced(self, *arguments):
        """The files that were opened or tried once the image was, and the calls made."""
        if shutil.which("strace") is None:
            self.skipTest("strace is not installed")
        log = self.path("trace")
        self.run_in(self.folder, "strace", "-f", "-o", log, os.environ.get("MINIVMM", "minivmm"),
                    "image", *arguments)
        with open(log, encoding="utf-8", errors="replace") as file:
            return file.read()

    def test_no_file_that_an_image_names_is_opened(self):
        for command in (["info"], ["check"], ["map"], ["measure", "-O", "qcow2"]):
            trace = self.traced(*command, "overlay")
            self.assertNotIn('"base"', trace, command)
            self.assertIn('"overlay"', trace, command)

    def test_the_kernel_is_asked_to_hold_it(self):
        trace = self.traced("map", "overlay")
        self.assertIn("landlock_restrict_self(", trace)
        self.assertIn("seccomp(SECCOMP_SET_MODE_FILTER", trace)
        self.assertNotIn("io_uring_setup", trace)

    def test_untrusted_under_the_name_qemu_img(self):
        self.assertEqual(json.loads(self.must(
            self.drop_in("map", "--untrusted", "--output=json", "overlay")).out)[1]["depth"], 1)
        os.unlink(self.path("base"))
        self.must(self.drop_in("map", "overlay"), 1)
        self.must(self.drop_in("map", "--untrusted", "overlay"))

    def test_references_out_of_the_folder_are_followed_as_qemu_img_only(self):
        os.mkdir(self.path("deep"))
        self.make("-f", "qcow2", "-b", "../base", "-F", "qcow2", "deep/overlay")
        self.must(self.drop_in("map", "deep/overlay"))
        done = self.must(self.ours("map", "--trusted", "deep/overlay"), 1)
        self.assertIn("--backing-root", done.err)
        self.must(self.ours("map", "--trusted", "--backing-root", ".", "deep/overlay"))

    def test_limits(self):
        done = self.must(self.ours("map", "--limit-memory", "1M", "overlay"), 1)
        self.assertNotEqual(done.err, "")

    def test_loops_are_told_with_the_chain(self):
        self.must(self.theirs("rebase", "-u", "-b", "overlay", "-F", "qcow2", "base"))
        for run in (self.drop_in, self.ours):
            done = self.must(run("convert", "-O", "raw", "overlay", "flat"), 1)
            self.assertIn("infinite loop: overlay -> base -> overlay", done.err)
            self.assertFalse(os.path.exists(self.path("flat")))

    def test_absurd_chains_are_told_with_their_beginning(self):
        self.make("-u", "-f", "qcow2", "-b", "n000", "-F", "qcow2", "n001", "1M")
        image = self.bytes_of("n001")
        for number in range(2, 230):
            with open(self.path(f"n{number:03}"), "wb") as file:
                file.write(image.replace(b"n000", f"n{number - 1:03}".encode()))
        shutil.copy(self.path("base"), self.path("n000"))
        for run in (self.drop_in, self.ours):
            for command in (["info", "--backing-chain", "n229"],
                            ["convert", "-O", "raw", "n229", "flat"]):
                done = self.must(run(*command), 1)
                self.assertRegex(done.err, r"longer than \d+ images: n229 -> n228 -> .* -> \.\.\.")

    def test_a_name_that_leads_elsewhere_a_moment_later_is_not_followed(self):
        # What the name leads to is looked at and then opened. Somebody who may write to the folder
        # changes it all the time between a file that is allowed and one that is not.
        os.mkdir(self.path("in"))
        os.mkdir(self.path("out"))
        shutil.copy(self.path("base"), self.path("in", "base"))
        self.make("-f", "qcow2", "out/secret", "7M")
        os.symlink("base", self.path("in", "name"))
        os.symlink("../out/secret", self.path("in", "other"))
        self.make("-u", "-f", "qcow2", "-b", "name", "-F", "qcow2", "in/overlay", "9M")
        swapper = subprocess.Popen([sys.executable, "-c", SWAP, self.path("in", "name"),
                                    self.path("in", "other")], stdout=subprocess.PIPE)
        try:
            swapper.stdout.readline()
            for _ in range(80):
                done = self.ours("info", "--backing-chain", "--output=json", "in/overlay")
                if done.status == 0:
                    sizes = [link["virtual-size"] for link in json.loads(done.out)]
                    self.assertEqual(sizes, [9 << 20, 1 << 20])
            for _ in range(40):
                done = self.ours("map", "--trusted", "--svg", "picture", "in/overlay")
                with open(self.path("picture"), encoding="utf-8") as file:
                    self.assertNotIn("secret", file.read())
        finally:
            swapper.kill()
            swapper.communicate()

    def test_an_image_in_use_is_refused_by_name_of_its_user(self):
        with self.in_use("overlay"):
            done = self.must(self.ours("convert", "-O", "raw", "overlay", "flat"), 1)
            self.assertRegex(done.err, r"it is locked by process \d+ \(qemu-io\)")
            ours = self.must(self.drop_in("convert", "-O", "raw", "overlay", "flat"), 1)
            theirs = self.must(self.theirs("convert", "-O", "raw", "overlay", "flat"), 1)
            self.assertEqual(ours.err, theirs.err)
            self.must(self.ours("convert", "-U", "-O", "raw", "overlay", "flat"))
            self.must(self.ours("info", "overlay"))
            # Also by commands that cannot look into /proc any more when they find that out.
            for command in (["check"], ["map"], ["measure", "-O", "qcow2"]):
                done = self.must(self.ours(*command, "overlay"), 1)
                self.assertRegex(done.err, r"it is locked by process \d+ \(qemu-io\)", command)
            for command in ("info", "check", "map"):
                self.same_answer(command, "overlay", status=1)
                self.must(self.drop_in(command, "-U", "overlay"))

    def test_names(self):
        self.assertIn("qemu-img version 7.2", self.must(self.drop_in("--version")).out)
        for arguments in ([], ["frob"], ["info"], ["info", "--frob", "x"], ["info", "-f"],
                          ["info", "no"], ["map"], ["check", "no"]):
            with self.subTest(arguments=arguments):
                self.same_answer(*arguments, status=1)


if __name__ == "__main__":
    main()
