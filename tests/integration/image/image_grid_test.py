# SPDX-License-Identifier: Apache-2.0
"""Interchange over a grid of creation options: an image that either program makes is written,
zeroed, discarded, snapshotted and resized by both in turn. In the end both programs' checks are
clean, and both find it equal to a raw file that had the same done to it.

MINIVMM_SLOW=1: 500 combinations instead of 60."""
import os
import random

from image_case import SEED, ImageCase, main

COMBINATIONS = 500 if os.environ.get("MINIVMM_SLOW") == "1" else 60
SECRET = ("--object", "secret,id=s,data=correct horse")


class Combination:
    """A point of the grid, and what may be done to it."""

    def __init__(self, rng):
        self.version = rng.choice(["0.10", "1.1", "1.1", "1.1"])
        new = self.version == "1.1"
        self.data_file = new and rng.random() < 0.15
        self.extended = new and rng.random() < 0.3
        smallest = 14 if self.extended else 9
        self.cluster = 1 << rng.randrange(smallest, 22)
        self.refcount = rng.choice([1, 2, 4, 8, 16, 32, 64]) if new else 16
        self.depth = 0 if self.data_file else rng.choice([0, 0, 1, 2, 4])
        self.zstd = new and not self.data_file and rng.random() < 0.3
        self.lazy = new and rng.random() < 0.2
        self.snapshots = not self.data_file and self.refcount >= 8
        self.resize = new
        self.stale = False  # there may be old data behind its end
        self.encryption = rng.choice([None] * 6 + ["aes", "luks"])
        self.compress = not self.data_file and self.refcount >= 8 and not self.encryption
        self.size = rng.randrange(1, 16) * max(self.cluster, 64 << 10) + rng.choice([0, 512, 7680])

    def options(self):
        out = [f"compat={self.version}", f"cluster_size={self.cluster}",
               f"refcount_bits={self.refcount}"]
        if self.extended:
            out.append("extended_l2=on")
        if self.zstd:
            out.append("compression_type=zstd")
        if self.lazy:
            out.append("lazy_refcounts=on")
        if self.data_file:
            raw = self.size % 3 and not self.encryption
            out += ["data_file=outside", f"data_file_raw={'on' if raw else 'off'}"]
        if self.encryption:
            out += [f"encrypt.format={self.encryption}", "encrypt.key-secret=s"]
        if self.encryption == "luks":
            out.append("encrypt.iter-time=10")
        return ",".join(out)

    def named(self, image):
        """An image of the chain, for either program."""
        if self.encryption and image == "image":
            return [*SECRET, "--image-opts", "driver=qcow2,file.filename=image,encrypt.key-secret=s"]
        return ["-f", "qcow2", image]

    def beside_model(self):
        """For compare."""
        if self.encryption:
            return [*self.named("image"), "driver=raw,file.filename=model"]
        return ["-f", "raw", "-F", "qcow2", "model", "image"]


class Grid(ImageCase):
    def test_both_in_turn(self):
        rng = random.Random(SEED)
        for number in range(COMBINATIONS):
            case = Combination(rng)
            with self.subTest(number=number, options=case.options(), depth=case.depth,
                              size=case.size):
                for name in os.listdir(self.folder):
                    if name != ".bin":
                        os.unlink(self.path(name))
                self.play(case, rng)

    def tool(self, rng):
        return rng.choice([self.ours, self.theirs])

    def play(self, case, rng):
        disk = self.make_chain(case, rng)
        snapshots = []
        for _ in range(rng.randrange(4, 12)):
            disk = self.step(case, disk, snapshots, rng)
        with open(self.path("model"), "wb") as file:
            file.write(disk)
        for tool in (self.ours, self.theirs):
            self.must(tool("check", *case.named("image")))
            self.must(tool("compare", *case.beside_model()))
        for name, content in snapshots:
            self.snapshot(self.tool(rng), case, "-a", name)
            with open(self.path("model"), "wb") as file:
                file.write(content)
            self.must(self.theirs("compare", *case.beside_model()))
        self.must(self.theirs("check", *case.named("image")))

    def snapshot(self, tool, case, action, name):
        # No -f in qemu-img's.
        self.must(tool("snapshot", action, name,
                       *(case.named("image") if case.encryption else ["image"])))

    def make_chain(self, case, rng):
        """Returns what the disk holds."""
        disk = bytearray(case.size)
        below = None
        if case.depth:
            self.fill("layer0", rng.randrange(1, case.size // 512 + 1) * 512, rng, runs=6,
                      longest=60_000)
            content = self.bytes_of("layer0")[:case.size]
            disk[:len(content)] = content
            below = ("layer0", "raw")
        for level in range(1, case.depth):
            name = f"layer{level}"
            self.must(self.tool(rng)("create", "-q", "-f", "qcow2", "-b", below[0], "-F", below[1],
                                     name, str(case.size)))
            for _ in range(3):
                self.write(name, disk, case, rng)
            below = (name, "qcow2")
        backing = ["-b", below[0], "-F", below[1]] if below else []
        # How dear a password is to try, QEMU cannot measure when that is little.
        tool = self.ours if case.encryption == "luks" else self.tool(rng)
        self.must(tool("create", "-q", *SECRET, "-f", "qcow2", "-o", case.options(), *backing,
                       "image", str(case.size)))
        return disk

    def step(self, case, disk, snapshots, rng):
        tool = self.tool(rng)
        kind = rng.randrange(10)
        if kind == 0 and case.snapshots and len(snapshots) < 4:
            name = f"name{rng.randrange(10 ** 9)}"
            self.snapshot(tool, case, "-c", name)
            snapshots.append((name, bytes(disk)))
        elif kind == 1 and snapshots:
            name, content = rng.choice(snapshots)
            self.snapshot(tool, case, "-a", name)
            return bytearray(content)
        elif kind == 2 and snapshots:
            index = rng.randrange(len(snapshots))
            self.snapshot(tool, case, "-d", snapshots[index][0])
            del snapshots[index]
        elif kind == 3 and case.resize:
            size = max(1, len(disk) // 512 + rng.randrange(-4000, 4000)) * 512
            # What QEMU cuts off comes back when QEMU makes the disk longer within the same cluster,
            # also in a snapshot that was taken meanwhile.
            if case.stale and size > len(disk):
                tool = self.ours
            case.stale = case.stale or (tool == self.theirs and size < len(disk))
            self.must(tool("resize", "--shrink", *case.named("image"), str(size)))
            return disk[:size].ljust(size, b"\0")
        else:
            self.write("image", disk, case, rng)
        return disk

    def theirs_io(self, case, image, command):
        self.must(self.run_in(self.folder, "qemu-io", "-c", command, *case.named(image)))

    def write(self, image, disk, case, rng):
        offset = rng.randrange(len(disk) // 512) * 512
        length = min(rng.randrange(1, 300) * 512, len(disk) - offset)
        pattern = rng.randrange(1, 256)
        kind = rng.randrange(7)
        if kind < 3:
            self.must(self.ours("bench", "-w", "-c", "1", "-d", "1", "-o", str(offset), "-s",
                                str(length), f"--pattern={pattern}", *case.named(image)))
        elif kind == 3:
            self.theirs_io(case, image, f"write -z {'-u ' if pattern % 2 else ''}{offset} {length}")
            pattern = 0
        elif kind == 4 and case.compress and image == "image":
            # A cluster, whole. QEMU does not store one compressed where there is data already.
            offset -= offset % case.cluster
            length = min(case.cluster, len(disk) - offset)
            told = self.run_in(self.folder, "qemu-io", "-f", "qcow2", "-c",
                               f"write -c -P {pattern} {offset} {length}", image)
            if told.status != 0:
                self.assertIn("write failed: Input/output error", told.out)
                return
        else:
            self.theirs_io(case, image, f"write -P {pattern} {offset} {length}")
        disk[offset:offset + length] = bytes([pattern]) * length


if __name__ == "__main__":
    main()
