# SPDX-License-Identifier: Apache-2.0
"""`minivmm image check` beside `qemu-img check`, on images with damage of our making."""
import json
import random
import struct

from image_case import SEED, ImageCase, main

CLUSTER = 65536


class Image:
    """A qcow2 file in memory, with the places of its tables. 64 KiB clusters, 16-bit refcounts."""

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.data = bytearray(file.read())
        self.data += bytes(-len(self.data) % CLUSTER)
        self.table = self.u64(48)
        self.block = self.u64(self.table)
        self.l1 = self.u64(40)
        self.l2 = self.u64(self.l1) & 0x00fffffffffffe00

    def u64(self, offset):
        return struct.unpack(">Q", self.data[offset:offset + 8])[0]

    def put_u64(self, offset, value):
        self.data[offset:offset + 8] = struct.pack(">Q", value)

    def clusters(self):
        return len(self.data) // CLUSTER

    def set_refcount(self, cluster, value):
        at = self.block + 2 * cluster
        self.data[at:at + 2] = struct.pack(">H", value)

    def data_cluster(self, number):
        return (self.u64(self.l2 + 8 * number) & 0x00fffffffffffe00) // CLUSTER

    def save(self):
        with open(self.path, "wb") as file:
            file.write(self.data)


def leak(image):
    image.data += bytes(CLUSTER)
    image.set_refcount(image.clusters() - 1, 1)


def missing_refcount(image):
    image.set_refcount(image.data_cluster(2), 0)


def high_refcount(image):
    image.set_refcount(image.data_cluster(3), 5)


def lost_copied_flag(image):
    image.put_u64(image.l2 + 8 * 4, image.u64(image.l2 + 8 * 4) & ~(1 << 63))


def shared_cluster(image):
    image.put_u64(image.l2 + 8 * 4, image.u64(image.l2 + 8 * 5))


def unaligned_data(image):
    image.put_u64(image.l2 + 8 * 4, image.u64(image.l2 + 8 * 4) | 512)


def leak_and_corruption(image):
    leak(image)
    shared_cluster(image)


def dirty_bit(image):
    image.data[79] |= 1


def corrupt_bit(image):
    image.data[79] |= 2


def without_end(text):
    """Refcounts made anew lie elsewhere."""
    return "".join(line + "\n" for line in text.splitlines()
                   if not line.startswith("Image end offset"))


class Check(ImageCase):
    def setUp(self):
        super().setUp()
        self.make("-f", "qcow2", "x", "64M")
        self.qemu_io("x", "write 0 1M", "write 10M 200k", "write -z 20M 1M", "discard 0 64k")

    def compare(self, name, status):
        for output in ("human", "json"):
            theirs = self.must(self.theirs("check", f"--output={output}", name), status)
            ours = self.must(self.ours("check", f"--output={output}", name), status)
            self.assertEqual(ours.err, theirs.err)
            self.assertEqual(ours.out, theirs.out)
            if output == "json":
                for key, value in json.loads(ours.out).items():
                    self.assertIs(type(value), str if key in ("filename", "format") else int, key)

    def test_damage_is_found_and_told_as_qemu_img_does(self):
        good = self.bytes_of("x")
        for damage, status in [(lambda image: None, 0), (leak, 3), (missing_refcount, 2),
                               (high_refcount, 2), (lost_copied_flag, 2), (shared_cluster, 2),
                               (leak_and_corruption, 2), (dirty_bit, 0),
                               (corrupt_bit, 0)]:
            with self.subTest(damage=getattr(damage, "__name__", "none")):
                with open(self.path("bad"), "wb") as file:
                    file.write(good)
                image = Image(self.path("bad"))
                damage(image)
                image.save()
                self.compare("bad", status)

    def test_unaligned_cluster_is_corruption(self):
        # Told in words of our own.
        image = Image(self.path("x"))
        unaligned_data(image)
        image.save()
        self.must(self.theirs("check", "x"), 2)
        self.assertIn("not aligned", self.must(self.ours("check", "x"), 2).err)

    def test_clean_images_of_every_kind(self):
        for number, options in enumerate(["compat=0.10", "cluster_size=512,refcount_bits=1",
                                          "cluster_size=2M,refcount_bits=64",
                                          "preallocation=metadata", "lazy_refcounts=on"]):
            with self.subTest(options=options):
                name = f"clean{number}"
                self.make("-f", "qcow2", "-o", options, name, "6M")
                self.qemu_io(name, "write 1M 300k", "write 100 1k")
                self.compare(name, 0)

    def test_snapshots_bitmaps_and_compression(self):
        self.must(self.theirs("snapshot", "-c", "first", "x"))
        self.qemu_io("x", "write 512k 2M")
        self.must(self.theirs("snapshot", "-c", "second", "x"))
        self.must(self.theirs("bitmap", "--add", "x", "bitmap"))
        self.compare("x", 0)
        self.must(self.theirs("convert", "-c", "-O", "qcow2", "x", "compressed"))
        self.compare("compressed", 0)

    def test_random_damage_is_never_called_clean(self):
        # Where qemu-img sees damage in the refcounts or the mapping and we do not, a user would
        # go on writing to a broken image.
        rng = random.Random(SEED)
        good = self.bytes_of("x")
        for number in range(80):
            with open(self.path("bad"), "wb") as file:
                file.write(good)
            image = Image(self.path("bad"))
            table, size = rng.choice([(image.block, 2 * image.clusters()), (image.l2, 512),
                                      (image.l1, 8), (image.table, 8)])
            for _ in range(rng.randint(1, 3)):
                image.data[table + rng.randrange(size)] ^= 1 << rng.randrange(8)
            image.save()
            theirs = self.theirs("check", "bad")
            ours = self.ours("check", "bad")
            told = f"seed {SEED}, number {number}\n{ours}\n{theirs}"
            self.assertIn(ours.status, (0, 1, 2, 3), told)
            if theirs.status != 0:
                self.assertNotEqual(ours.status, 0, told)

    def test_format_without_checks(self):
        self.make("-f", "raw", "plain", "1M")
        done = self.must(self.ours("check", "plain"), 63)
        self.assertEqual(done.err, "minivmm: This image format does not support checks\n")
        self.assertEqual(self.theirs("check", "plain").status, 63)

    def test_quiet(self):
        image = Image(self.path("x"))
        leak(image)
        image.save()
        for output in ("human", "json"):
            done = self.must(self.ours("check", "-q", f"--output={output}", "x"), 3)
            theirs = self.theirs("check", "-q", f"--output={output}", "x")
            self.assertEqual((done.out, done.err), (theirs.out, theirs.err))

    def test_repair_as_qemu_img_does(self):
        # The same damage repaired by both: the same summary, status and numbers, and images that
        # either tool then finds clean and that hold the same.
        good = self.bytes_of("x")
        for damage in (leak, missing_refcount, high_refcount, lost_copied_flag, shared_cluster,
                       leak_and_corruption, dirty_bit, corrupt_bit):
            for what in ("leaks", "all"):
                if damage is missing_refcount and what == "leaks":
                    # qemu-img gives up (1) where it would have to make refcounts anew; we say that
                    # corruption is left.
                    continue
                with self.subTest(damage=damage.__name__, what=what):
                    for name in ("ours", "theirs"):
                        with open(self.path(name), "wb") as file:
                            file.write(good)
                        image = Image(self.path(name))
                        damage(image)
                        image.save()
                    theirs = self.theirs("check", "-r", what, "theirs")
                    ours = self.ours("check", "-r", what, "ours")
                    told = f"{ours}\n{theirs}"
                    self.assertEqual(ours.status, theirs.status, told)
                    self.assertEqual(without_end(ours.out), without_end(theirs.out), told)
                    if what == "all":
                        self.assertEqual(ours.status, 0, told)
                        for name in ("ours", "theirs"):
                            self.must(self.theirs("check", name))
                            self.must(self.ours("check", name))
                        self.must(self.theirs("compare", "ours", "theirs"))

    def test_repair_told_as_json(self):
        for name in ("ours", "theirs"):
            with open(self.path(name), "wb") as file:
                file.write(self.bytes_of("x"))
            image = Image(self.path(name))
            leak_and_corruption(image)
            image.save()
        theirs = self.must(self.theirs("check", "-r", "all", "--output=json", "theirs"))
        ours = self.must(self.ours("check", "-r", "all", "--output=json", "ours"))
        expected = json.loads(theirs.out)
        expected["filename"] = "ours"
        self.assertEqual(json.loads(ours.out), expected)
        self.assertEqual(ours.out.replace("ours", "theirs"), theirs.out)

    def test_repair_needs_to_know_what(self):
        before = self.bytes_of("x")
        self.assertIn("expecting 'leaks' or 'all'",
                      self.must(self.ours("check", "-r", "nope", "x"), 1).err)
        self.must(self.ours("check", "-r", "all", "--untrusted", "x"), 1)
        self.assertEqual(self.bytes_of("x"), before)

    def test_random_damage_is_repaired(self):
        rng = random.Random(SEED)
        good = self.bytes_of("x")
        for number in range(40):
            with open(self.path("bad"), "wb") as file:
                file.write(good)
            image = Image(self.path("bad"))
            table, size = rng.choice([(image.block, 2 * image.clusters()), (image.l2, 512),
                                      (image.l1, 8), (image.table, 8)])
            for _ in range(rng.randint(1, 3)):
                image.data[table + rng.randrange(size)] ^= 1 << rng.randrange(8)
            image.save()
            ours = self.ours("check", "-r", "all", "bad")
            told = f"seed {SEED}, number {number}\n{ours}"
            self.assertEqual(ours.status, 0, told)
            self.must(self.theirs("check", "bad"))

    def test_image_in_use(self):
        # What is being written has no consistent state to check; -U looks all the same.
        with self.in_use("x"):
            done = self.must(self.ours("check", "x"), 1)
            self.assertIn("in use", done.err)
            self.must(self.ours("check", "-U", "x"))
        self.must(self.ours("check", "x"))

    def test_needs_no_backing_file(self):
        self.make("-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "overlay", "1M")
        self.must(self.ours("check", "overlay"))

    def test_cache_modes(self):
        for mode in ("none", "writeback", "unsafe", "writethrough", "directsync"):
            self.must(self.ours("check", "-T", mode, "x"))
        self.assertIn("Invalid source cache option: nope",
                      self.must(self.ours("check", "-T", "nope", "x"), 1).err)


if __name__ == "__main__":
    main()
