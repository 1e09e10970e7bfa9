# SPDX-License-Identifier: Apache-2.0
"""What the tests of the image tool share: a folder, the two programs, and somebody who uses an
image meanwhile."""
import os
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

MINIVMM = os.environ.get("MINIVMM", "minivmm")
SEED = int(os.environ.get("MINIVMM_SEED", random.randrange(1 << 30)))


class Result:
    def __init__(self, done):
        self.status = done.returncode
        self.out = done.stdout.decode("utf-8", "surrogateescape")
        self.err = done.stderr.decode("utf-8", "surrogateescape")

    def __repr__(self):
        return f"status {self.status}\n--- out\n{self.out}--- err\n{self.err}"


class ImageCase(unittest.TestCase):
    """Each test has a folder of its own and runs in it."""

    maxDiff = None

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="minivmm-image-")
        self.addCleanup(shutil.rmtree, self.folder)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def bytes_of(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def run_in(self, folder, *command):
        # No command of these tests may take long: a hang is a failure.
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60,
                              stdin=subprocess.DEVNULL)
        return Result(done)

    def ours(self, *arguments, folder=None):
        return self.run_in(folder or self.folder, MINIVMM, "image", *arguments)

    def drop_in(self, *arguments, folder=None):
        """Ours under the name qemu-img."""
        name = self.path(".bin", "qemu-img")
        if not os.path.lexists(name):
            os.makedirs(os.path.dirname(name), exist_ok=True)
            os.symlink(os.path.abspath(MINIVMM), name)
        return self.run_in(folder or self.folder, name, *arguments)

    def theirs(self, *arguments, folder=None):
        return self.run_in(folder or self.folder, "qemu-img", *arguments)

    def must(self, result, status=0):
        self.assertEqual(result.status, status, repr(result))
        return result

    def make(self, *arguments):
        """An image by qemu-img."""
        return self.must(self.theirs("create", "-q", *arguments))

    def qemu_io(self, name, *commands):
        words = [word for command in commands for word in ("-c", command)]
        return self.must(self.run_in(self.folder, "qemu-io", "-f", "qcow2", *words, name))

    def same_answer(self, *arguments, status=None, err=True):
        """Ours under the name qemu-img says and returns what qemu-img does. Returns it."""
        theirs = self.theirs(*arguments)
        ours = self.drop_in(*arguments)
        told = f"{arguments}\n=== ours\n{ours}\n=== theirs\n{theirs}"
        self.assertEqual(ours.status, theirs.status, told)
        self.assertEqual(ours.out, theirs.out, told)
        if err:
            self.assertEqual(ours.err, theirs.err, told)
        if status is not None:
            self.assertEqual(ours.status, status, told)
        return ours

    def fill(self, name, size, rng, runs=40, longest=300_000):
        """A sparse raw file with random runs of data, and of zeroes that are stored."""
        with open(self.path(name), "wb") as file:
            file.truncate(size)
            for _ in range(runs):
                length = rng.randint(1, longest)
                file.seek(rng.randrange(max(1, size - length)))
                file.write(bytes(length) if rng.random() < 0.3 else rng.randbytes(length))
            file.truncate(size)

    def in_use(self, name):
        """A context in which somebody has the image open for writing."""
        return Writer(self.path(name))


class Writer:
    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.process = subprocess.Popen(["qemu-io", "-f", "qcow2", self.path],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)
        # It answers once it has opened the image and taken its locks.
        self.process.stdin.write(b"length\n")
        self.process.stdin.flush()
        answer = b""
        while b"\n" not in answer:
            piece = os.read(self.process.stdout.fileno(), 4096)
            if not piece:
                raise AssertionError(f"qemu-io ended: {answer}")
            answer += piece
        return self

    def __exit__(self, *_):
        self.process.communicate(b"quit\n", timeout=30)


def main():
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        print("skipped: qemu-img and qemu-io are not installed (Debian: qemu-utils)")
        sys.exit(77)
    print(f"seed {SEED} (MINIVMM_SEED repeats it)", file=sys.stderr)
    unittest.main(verbosity=1)
