# SPDX-License-Identifier: Apache-2.0
"""`minivmm image create` beside `qemu-img create`."""
import json
import os
import random

from image_case import SEED, ImageCase, main


class Create(ImageCase):
    def setUp(self):
        super().setUp()
        for folder in ("a", "b"):
            os.mkdir(self.path(folder))

    def create_both(self, *arguments):
        """The same call in two folders: ours in a/, qemu-img's in b/."""
        return (self.ours("create", *arguments, folder=self.path("a")),
                self.theirs("create", *arguments, folder=self.path("b")))

    def info(self, folder, name):
        info = json.loads(self.must(
            self.theirs("info", "--output=json", name, folder=self.path(folder))).out)
        del info["actual-size"]  # how much of the metadata is a hole is each program's choice
        return info

    def test_grid_of_options_gives_the_same_image_and_line_as_qemu_img(self):
        # A field that is written wrongly, or a default that differs, shows in qemu-img's own info
        # of the two images; wrong refcounts in its check.
        rng = random.Random(SEED)
        for folder in ("a", "b"):
            self.must(self.theirs("create", "-q", "-f", "qcow2", "base.qcow2", "3M",
                                  folder=self.path(folder)))
            self.must(self.theirs("create", "-q", "-f", "raw", "base.raw", "5M",
                                  folder=self.path(folder)))
        for number in range(60):
            arguments = self.random_arguments(rng)
            with self.subTest(number=number, arguments=arguments):
                ours, theirs = self.create_both(*arguments)
                self.assertEqual(ours.status, theirs.status, f"{ours}\n{theirs}")
                if theirs.status != 0:
                    continue
                self.assertEqual(ours.out, theirs.out)
                name = "image.qcow2"
                self.assertEqual(self.info("a", name), self.info("b", name))
                self.must(self.theirs("check", name, folder=self.path("a")))
                self.must(self.run_in(self.path("a"), "qemu-io", "-f", "qcow2", "-c",
                                      "write -P 7 100k 300k", "-c", "read -P 7 100k 300k", name))
                self.must(self.ours("check", name, folder=self.path("a")))

    def random_arguments(self, rng):
        options = []
        version = rng.choice(["", "0.10", "v2", "1.1", "v3"])
        if version:
            options.append(f"compat={version}")
        if rng.random() < 0.7:
            options.append(f"cluster_size={rng.choice(['512', '4k', '64k', '128K', '2M'])}")
        if rng.random() < 0.6:
            options.append(f"refcount_bits={rng.choice([1, 2, 4, 8, 16, 32, 64])}")
        if rng.random() < 0.4:
            options.append(f"compression_type={rng.choice(['zlib', 'zstd'])}")
        if rng.random() < 0.5:
            options.append(rng.choice(["lazy_refcounts=on", "lazy_refcounts=off",
                                       "lazy_refcounts"]))
        backing = rng.choice([None, None, "qcow2", "raw"])
        if backing is None and rng.random() < 0.4:
            options.append(f"preallocation={rng.choice(['off', 'metadata'])}")
        rng.shuffle(options)
        arguments = ["-f", "qcow2"]
        if options:
            arguments += ["-o", ",".join(options)]
        if backing:
            arguments += ["-b", f"base.{backing}", "-F", backing]
        arguments.append("image.qcow2")
        if not backing or rng.random() < 0.5:
            arguments.append(rng.choice(["1M", "1048577", "33M", "1.5M", "0x200000"]))
        return arguments

    def test_formatting_lines_match(self):
        # Scripts read this line; each case is one rule of how it is put together.
        for arguments in [
                ["-f", "qcow2", "x", "1000"],
                ["-f", "raw", "x", "1M"],
                ["x", "1k"],
                ["-f", "qcow2", "-o", "size=5M", "x"],
                ["-f", "qcow2", "-o", "cluster_size=64k", "-o", "cluster_size=128k", "x", "1M"],
                ["-f", "qcow2", "-o", "lazy_refcounts=yes,compat=1.1,preallocation=off", "x", "1M"],
                ["-f", "qcow2", "-u", "-b", "with,comma", "-F", "raw", "x", "1M"],
                ["-f", "qcow2", "-u", "-o", "backing_file=a,backing_fmt=qcow2", "x", "1M"],
                ["-f", "raw", "-o", "preallocation=full", "x", "64k"],
                ["-f", "raw", "-o", "preallocation=falloc", "x", "64k"],
                ["-q", "-f", "qcow2", "x", "1M"],
                ["-f", "qcow2", "file:x", "1M"],
                ["-f", "qcow2", "--", "x", "1M"],
        ]:
            with self.subTest(arguments=arguments):
                ours, theirs = self.create_both(*arguments)
                self.must(theirs)
                self.must(ours)
                self.assertEqual(ours.out, theirs.out)

    def test_what_qemu_img_refuses_is_refused_in_its_words(self):
        for folder in ("a", "b"):
            self.must(self.theirs("create", "-q", "-f", "qcow2", "base", "1M",
                                  folder=self.path(folder)))
        for arguments in [
                ["-f", "nope", "x", "1M"],
                ["-f", "qcow2", "x"],
                ["-f", "qcow2", "x", "1M", "2M"],
                ["-f", "qcow2", "x", "1X"],
                ["-f", "qcow2", "x", "8E"],
                ["-f", "qcow2", "-o", "size=5M", "x", "7M"],
                ["-f", "qcow2", "-o", "nope=1", "x", "1M"],
                ["-f", "qcow2", "-o", "refcount_bits=abc", "x", "1M"],
                ["-f", "qcow2", "-o", "refcount_bits=3", "x", "1M"],
                ["-f", "qcow2", "-o", "lazy_refcounts=maybe", "x", "1M"],
                ["-f", "qcow2", "-o", "cluster_size=", "x", "1M"],
                ["-f", "qcow2", "-o", "cluster_size=3", "x", "1M"],
                ["-f", "qcow2", "-o", "cluster_size=4M", "x", "1M"],
                ["-f", "qcow2", "-o", "compat=0.10,lazy_refcounts=on", "x", "1M"],
                ["-f", "qcow2", "x", "100P"],
                ["-f", "qcow2", "-b", "base", "x"],
                ["-f", "qcow2", "-F", "raw", "x", "1M"],
                ["-f", "qcow2", "-b", "x", "-F", "qcow2", "x"],
                ["-f", "qcow2", "-u", "-b", "nope", "x", "1M"],
                ["-f", "qcow2", "-u", "-b", "nope", "-F", "qcow2", "x"],
                ["-f", "raw", "-b", "base", "x", "1M"],
                ["-f", "raw", "-F", "qcow2", "x", "1M"],
                ["-f", "raw", "-o", "cluster_size=4k", "x", "1M"],
                ["-f", "qcow2", "nope:x", "1M"],
                ["-f", "qcow2", "nope/x", "1M"],
                ["-f", "qcow2"],
        ]:
            with self.subTest(arguments=arguments):
                ours, theirs = self.create_both(*arguments)
                self.must(theirs, 1)
                self.must(ours, 1)
                # Ours may say more after it.
                wanted = theirs.err.splitlines()[0].replace("qemu-img: ", "minivmm: ", 1)
                wanted = wanted.replace("version=v3", "compat=1.1")
                self.assertTrue(ours.err.startswith(wanted), f"{ours.err}\nnot\n{wanted}")
                self.assertFalse(os.path.exists(self.path("a", "x")))

    def test_external_data_file(self):
        for options in ("data_file=d", "data_file=d,data_file_raw=on"):
            ours, theirs = self.create_both("-f", "qcow2", "-o", options, "x", "3M")
            self.must(theirs)
            self.assertEqual((ours.status, ours.out), (theirs.status, theirs.out), ours)
            self.assertEqual(self.info("a", "x"), self.info("b", "x"))
            self.must(self.run_in(self.path("a"), "qemu-io", "-f", "qcow2", "-c",
                                  "write -P 7 1M 300k", "x"))
            self.must(self.theirs("check", "x", folder=self.path("a")))
            self.must(self.ours("convert", "-O", "raw", "x", "flat", folder=self.path("a")))
            self.must(self.theirs("compare", "-F", "raw", "x", "flat", folder=self.path("a")))
            answers = [run("map", "--output=json", "x", folder=self.path("a"))
                       for run in (self.drop_in, self.theirs)]
            self.assertEqual(answers[0].out, answers[1].out)
        self.must(self.ours("create", "-f", "qcow2", "-o", "data_file=x", "x", "1M",
                            folder=self.path("a")), 1)

    def test_raw_preallocation(self):
        for mode, least in [("off", 0), ("falloc", 1 << 20), ("full", 1 << 20)]:
            with self.subTest(mode=mode):
                self.must(self.ours("create", "-q", "-f", "raw", "-o", f"preallocation={mode}", "x",
                                    "1000000"))
                info = os.stat(self.path("x"))
                self.assertEqual(info.st_size, 1000448)  # whole sectors
                allocated = info.st_blocks * 512
                if least:
                    self.assertGreaterEqual(allocated, 1000448)
                else:
                    self.assertLess(allocated, 65536)
        done = self.must(self.ours("create", "-f", "raw", "-o", "preallocation=metadata", "x",
                                   "1M"), 1)
        self.assertIn("Unsupported preallocation mode: metadata", done.err)

    def test_overwrites_what_is_there(self):
        self.must(self.ours("create", "-q", "-f", "raw", "-o", "preallocation=full", "x", "3M"))
        self.must(self.ours("create", "-q", "-f", "qcow2", "x", "1M"))
        self.must(self.theirs("check", "x"))
        self.assertLess(os.stat(self.path("x")).st_size, 1 << 20)

    def test_refuses_to_overwrite_an_image_in_use(self):
        # A guest's running disk would be gone.
        self.make("-f", "qcow2", "x", "1M")
        with self.in_use("x"):
            before = self.bytes_of("x")
            for form in ("qcow2", "raw"):
                done = self.must(self.ours("create", "-f", form, "x", "1M"), 1)
                self.assertIn("in use", done.err)
            self.assertEqual(self.bytes_of("x"), before)
        self.must(self.ours("create", "-f", "qcow2", "x", "1M"))

    def test_backing_file_may_be_in_use(self):
        self.make("-f", "qcow2", "base", "7M")
        with self.in_use("base"):
            self.must(self.ours("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x"))
        self.assertEqual(json.loads(self.theirs("info", "--output=json", "x").out)["virtual-size"],
                         7 << 20)

    def test_backing_file_is_relative_to_the_new_image(self):
        self.make("-f", "qcow2", "a/base", "7M")
        done = self.must(self.ours("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "b/x"), 1)
        self.assertIn("b/base", done.err)
        self.must(self.ours("create", "-f", "qcow2", "-b", "../a/base", "-F", "qcow2", "b/x"))
        self.must(self.theirs("check", "b/x"))

    def test_never_overwrites_its_own_backing_file_under_another_name(self):
        # By name these are two files; truncating the new one would destroy the old one.
        self.make("-f", "qcow2", "base", "1M")
        before = self.bytes_of("base")
        os.symlink("base", self.path("link"))
        os.link(self.path("base"), self.path("hard"))
        for name in ("./base", "link", "hard"):
            done = self.must(self.ours("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", name),
                             1)
            self.assertIn("same filename as the backing file", done.err)
        self.assertEqual(self.bytes_of("base"), before)

    def test_wrong_backing_format_is_found(self):
        self.make("-f", "raw", "base", "1M")
        self.must(self.ours("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x"), 1)
        done = self.must(self.ours("create", "-f", "qcow2", "-b", "base", "-F", "vmdk", "x"), 1)
        self.assertIn("Unknown backing file format 'vmdk'", done.err)
        self.assertFalse(os.path.exists(self.path("x")))

    def test_a_failure_leaves_no_half_made_file(self):
        # No file system takes this size with preallocation.
        done = self.ours("create", "-f", "raw", "-o", "preallocation=falloc", "x", "4E")
        self.must(done, 1)
        self.assertFalse(os.path.exists(self.path("x")))

    def test_help_of_options(self):
        done = self.must(self.ours("create", "-f", "qcow2", "-o", "help"))
        theirs = self.theirs("create", "-f", "qcow2", "-o", "help")
        self.assertEqual(done.out.splitlines()[0], theirs.out.splitlines()[0])
        # Only what is supported is offered, each line as qemu-img's begins.
        self.assertNotIn("nocow", done.out)
        for line in done.out.splitlines():
            left = line.split(" - ")[0].rstrip()
            self.assertIn(left, theirs.out)


if __name__ == "__main__":
    main()
