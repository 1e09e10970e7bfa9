# SPDX-License-Identifier: Apache-2.0
"""Benchmark images, and in which state they are in the page cache.

A file system may keep a file in the page cache in large folios (ext4 up to 2 MiB), and ext4 then
looks at every block of a folio on each small write: a 4 KiB write costs 12 to 16 us instead of 1
to 2, and every server looks the same. So there are two images of one size: 'small', written 4 KiB
at a time (small folios), for 4 KiB cases, and 'large', written 1 MiB at a time, for sequential
ones.
"""

import os
import shutil

from . import processes

MIB = 1 << 20


def _write(path, size, step):
    block = os.urandom(step)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for offset in range(0, size, step):
            os.pwrite(fd, block, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_in_small_steps(source, target):
    """A copy whose page-cache folios are small, as if written by a guest."""
    step = 4096
    with open(source, "rb") as f:
        out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            offset = 0
            while chunk := f.read(MIB):
                for at in range(0, len(chunk), step):
                    os.pwrite(out, chunk[at:at + step], offset + at)
                offset += len(chunk)
            os.fsync(out)
        finally:
            os.close(out)


class Images:
    """Makes an image when it is first asked for."""

    def __init__(self, workplace, size):
        self._workplace = workplace
        self.size = size
        self._made = {}

    def get(self, name):
        if name not in self._made:
            path = self._workplace.file(f"{name}.img")
            getattr(self, f"_make_{name}")(path)
            self._made[name] = path
        return self._made[name]

    def _make_small(self, path):
        _write(path, self.size, 4096)

    def _make_large(self, path):
        _write(path, self.size, MIB)

    def _make_qcow2(self, path):
        """Every cluster allocated, refcounts and tables as qemu-img lays them out."""
        tool = shutil.which("qemu-img")
        if not tool:
            raise processes.Failed("qemu-img is needed to make the qcow2 image")
        rough = path + ".rough"
        processes.run([tool, "convert", "-f", "raw", "-O", "qcow2", "-S", "0",
                       self.get("small"), rough], timeout=300)
        _copy_in_small_steps(rough, path)
        os.unlink(rough)

    def warm(self, name):
        """Reads the image through, so that it is in the page cache; the folios stay as they are."""
        with open(self.get(name), "rb") as f:
            while f.read(MIB):
                pass
