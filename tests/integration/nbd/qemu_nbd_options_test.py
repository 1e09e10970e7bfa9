#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""qemu-nbd's command line, given to the program under that name and to the real one: what is refused
is refused in the same words, and what is served looks the same to a client."""

import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "support"))
from harness.daemon import minivmm
from harness.nbd import NbdClient
from harness.scene import MIB, Scene, have, run, wait_until

LIMIT = 20.0
HINT = "Try `qemu-nbd --help' for more information."

# Command lines that end at once, with status 1 and these words in both. {long}: more than the
# protocol carries of a name.
SAME_WORDS = r"""
-Z
--nosuch
--nosuch=1
-p
--nocache=1 raw
raw raw
-t
-f raw
-c /dev/nbd0
-d
-L raw
-L -x name
-L -D text
-L -o 1
-L -B bitmap
-L -A
-L -f raw
-L -l snap
-L -n
-L --cache=none
-L --aio=threads
-L --discard=unmap
-L -c /dev/nbd0
-L -d
-L --fork
-L -k {dir}/nobody
-k relative raw
-k relative -c /dev/nbd0 raw
-o x -f raw raw
-o 1k -f raw raw
-o 2M -f raw raw
-e x raw
-e -1 raw
-e 4x raw
-e
--cache=nosuch raw
-n --cache=none raw
--cache=none -n raw
--cache=none --cache=none raw
--aio=nosuch raw
-k {dir}/s --aio=native --aio=native raw
-k {dir}/s --aio=native -f raw raw
-k {dir}/s --aio=native --cache=writethrough -f raw raw
--discard=nosuch raw
--discard=unmap --discard=unmap raw
--detect-zeroes=nosuch raw
--detect-zeroes=unmap raw
--discard=ignore --detect-zeroes=unmap raw
--image-opts -f raw driver=raw
--tls-authz=a raw
--tls-hostname=h raw
--tls-hostname=h -L
-L --tls-authz=a --tls-creds=c
--tls-creds=c -c /dev/nbd0 -f raw raw
--tls-hostname=h --tls-creds=c -f raw raw
--selinux-label=x raw
-x {long} raw
-D {long} raw
-B nosuch -k {dir}/b1 -f raw raw
-B nosuch -k {dir}/b2 -f qcow2 disk.qcow2
-B good -B nosuch -k {dir}/b3 -f qcow2 disk.qcow2
-B bad -k {dir}/b4 -f qcow2 disk.qcow2
-d {dir}/nosuch
-d {dir}
"""

# Refused by both, each in words of its own.
REFUSED = r"""
-f nosuch raw
nosuch
-f qcow2 raw
--fork nosuch
--fork -f qcow2 raw
-l nosuch -f qcow2 disk.qcow2
-l snap -f raw raw
-l snapshot.id=7 -f qcow2 disk.qcow2
-s -l nosuch -f qcow2 disk.qcow2
-o 1048577 -f raw raw
-o 18446744073709551615 -f raw raw
-o -1 -f raw raw
-p nosuch -f raw raw
-b nosuch.invalid -f raw raw
-k {long} -f raw raw
-k /nosuch/s -f raw raw
--pid-file=/nosuch/x -f raw raw
--image-opts driver=nosuch
--image-opts driver=raw,nosuch=1,file.driver=file,file.filename=raw
--image-opts raw
--object nosuch
--object secret,id=a
--object tls-creds-psk,id=t,endpoint=client,dir={dir} --tls-creds=t -f raw raw
--tls-creds=t -f raw raw
-L --tls-creds=t
-c /dev/nbd0 -f raw nosuch
-c {dir}/raw -f raw raw
-c nonsense -f raw raw
"""

# What is served, and under which name it is asked for. A line that begins with "=" is content only:
# what is offered is meant to differ (see DIFFERS).
SERVED = r"""
-f raw raw
-f raw -r raw
-f raw -e 0 raw
-f raw -e 1 raw
-f raw -e 7 raw
-f raw -e 7 -r raw
-f raw --shared=3 raw
-f raw -o 512 raw
-f raw -o 1048064 raw
-f raw -o 1048576 raw
-f raw -o 4096 -r raw
-f raw -o 4096 -s raw
-f raw -n raw
-f raw --cache=none raw
-f raw --cache=off raw
-f raw --cache=directsync raw
-f raw --cache=writethrough raw
-f raw --cache=writethrough -o 4096 raw
-f raw --cache=unsafe raw
-f raw --cache=writeback raw
-f raw -n --aio=native raw
-f raw --aio=threads raw
-f raw --aio=io_uring raw
-f raw --discard=unmap raw
-f raw --discard=on raw
-f raw --discard=off raw
-f raw --discard=ignore raw
-f raw --detect-zeroes=off raw
-f raw --detect-zeroes=on raw
-f raw --discard=unmap --detect-zeroes=unmap raw
-f raw --discard=unmap --detect-zeroes=on -o 4096 raw
-f raw -x name raw
-f raw -x name -D description raw
-f raw -D description raw
-f raw -s raw
-f raw -r -s raw
-f raw -v raw
-f raw -A raw
-f raw -A -r raw
-f raw -T nosuch raw
-f raw --selinux-label= raw
-f qcow2 disk.qcow2
-f qcow2 -A disk.qcow2
-f qcow2 -A top.qcow2
-f qcow2 -A -s top.qcow2
-f qcow2 -r top.qcow2
-f qcow2 -B good disk.qcow2
-f qcow2 -r -B old disk.qcow2
-f qcow2 -B old -B good -A disk.qcow2
-f qcow2 --bitmap=old --allocation-depth disk.qcow2
-f qcow2 -l snap disk.qcow2
-f qcow2 -l 1 disk.qcow2
-f qcow2 -l snapshot.name=snap disk.qcow2
-f qcow2 -l snapshot.id=1 disk.qcow2
-f qcow2 -l snapshot.id=1,snapshot.name=snap disk.qcow2
-f qcow2 --load-snapshot=snap -x s -D text disk.qcow2
-f qcow2 -o 65536 disk.qcow2
-f qcow2 -s --discard=unmap disk.qcow2
-f qcow2 -n disk.qcow2
-f qcow2 -t -t disk.qcow2
-f raw disk.qcow2
disk.qcow2
top.qcow2
-r disk.qcow2
raw
-r raw
--image-opts driver=raw,file.driver=file,file.filename=raw
--image-opts driver=raw,offset=4096,size=65536,file.driver=file,file.filename=raw
--image-opts driver=qcow2,file.driver=file,file.filename=disk.qcow2
--image-opts -r driver=qcow2,file.driver=file,file.filename=disk.qcow2
--image-opts driver=qcow2,file.driver=file,file.filename=disk.qcow2 --discard=unmap
--format=raw --read-only --persistent raw
--export-name=n --description=d --format=raw raw
"""

# Rows that are answered differently, and why.
DIFFERS = {
    # A size that is no multiple of 512 is told as it is.
    "-f raw disk.qcow2",
    # Labels of sockets are a matter of chcon.
    "-f raw --selinux-label= raw",
}


def rows(text, **names):
    return [shlex.split(line.format(**names)) for line in text.strip().splitlines()
            if line not in DIFFERS]


@unittest.skipUnless(have("qemu-nbd", "qemu-io", "qemu-img", "nbdinfo"), "QEMU's tools are not there")
class Options(Scene):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("bin"))
        os.symlink(minivmm(), self.path("bin/qemu-nbd"))
        with open(self.path("raw"), "wb") as f:
            f.write(self.random.randbytes(MIB // 2) + bytes(MIB // 2))
        for command in ("convert -f raw -O qcow2 raw disk.qcow2", "snapshot -c snap disk.qcow2",
                        "bitmap --add -g 64k disk.qcow2 old",
                        "create -q -f qcow2 -b disk.qcow2 -F qcow2 top.qcow2"):
            subprocess.run(["qemu-img", *command.split()], cwd=self.dir, check=True)
        for command in ("write -P 9 0 64k", "write -z 128k 64k"):
            subprocess.run(["qemu-io", "-c", command, "disk.qcow2"], cwd=self.dir, check=True,
                           stdout=subprocess.DEVNULL)
        for command in ("bitmap --add -g 64k disk.qcow2 good", "bitmap --add disk.qcow2 bad"):
            subprocess.run(["qemu-img", *command.split()], cwd=self.dir, check=True)
        subprocess.run(["qemu-io", "-c", "write -P 7 64k 128k", "top.qcow2"], cwd=self.dir, check=True,
                       stdout=subprocess.DEVNULL)
        self.spoil("disk.qcow2", b"bad")
        self.socket = self.path("s")
        self.programs = (self.path("bin/qemu-nbd"), "qemu-nbd")

    def spoil(self, image, bitmap):
        """Marks a bitmap as in use, as one that a crash left."""
        with open(self.path(image), "r+b") as f:
            content = f.read()
            # The name ends an entry of the directory; extra data there is none.
            at = content.rfind(bitmap) - 24
            flags = int.from_bytes(content[at + 12:at + 16], "big")
            f.seek(at + 12)
            f.write((flags | 1).to_bytes(4, "big"))

    def side_by_side(self, jobs, work):
        """Calls work(job) for each, several at once; a failure names its row."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for job, done in [(job, pool.submit(work, job)) for job in jobs]:
                with self.subTest(arguments=" ".join(job)[:80]):
                    done.result()

    def own_folder(self):
        """The images again, for servers that must not meet others."""
        out = tempfile.mkdtemp(dir=self.dir)
        for name in ("raw", "disk.qcow2", "top.qcow2"):
            shutil.copy(self.path(name), out)
        return out

    def ends(self, program, arguments, folder=None):
        done = subprocess.run([program, *arguments], cwd=folder or self.dir, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=LIMIT, check=False)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def same_words(self, arguments):
        folder = self.own_folder()
        ours, theirs = (self.ends(p, arguments, folder) for p in self.programs)
        self.assertEqual(theirs[0], 1, theirs[1])
        # A guess is told of by both, and by QEMU before other things go wrong.
        words = [[line for line in text.splitlines() if not line.startswith(("WARN", "    "))]
                 for _, text in (ours, theirs)]
        self.assertEqual(ours[0], 1, ours[1])
        self.assertEqual(*words)

    def refused(self, arguments):
        folder = self.own_folder()
        for program in self.programs:
            status, text = self.ends(program, arguments, folder)
            self.assertEqual(status, 1, f"{program}: {text}")
            self.assertTrue(text.strip(), "it does not say why")

    def test_what_is_refused(self):
        names = {"dir": self.dir, "long": "x" * 5000}
        self.side_by_side(rows(SAME_WORDS, **names), self.same_words)
        self.side_by_side(rows(REFUSED, **names), self.refused)

    def seen(self, program, arguments, folder):
        """What a client sees of it: the list, and all of the export's content and abilities."""
        name = ""
        for at, word in enumerate(arguments):
            if word == "-x":
                name = arguments[at + 1]
            if word.startswith("--export-name="):
                name = word.split("=")[1]
        socket = os.path.join(folder, "s")
        if os.path.exists(socket):
            os.unlink(socket)
        server = subprocess.Popen([program, "-t", "-k", socket, *arguments], cwd=folder,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            wait_until(lambda: os.path.exists(socket) or server.poll() is not None, LIMIT,
                       "the socket is there")
            if server.poll() is not None:
                self.fail(f"{program}: {server.stderr.read().decode()}")
            uri = f"nbd+unix:///{name}?socket={socket}"
            until = time.monotonic() + LIMIT
            while True:
                status, text = run(["nbdinfo", "--json", uri])
                if status == 0 or time.monotonic() > until:
                    break
                time.sleep(0.01)
            self.assertEqual(status, 0, text)
            export = json.loads(text)["exports"][0]
            for key in ("uri", "content",  # as the kind of file is read
                        "block_size_minimum", "block_size_preferred",  # any request is taken here
                        "is_rotational", "can_fast_zero", "can_cache"):
                export.pop(key, None)
            export["contexts"].sort()
            maps = {}
            for context in export["contexts"]:
                if context != "base:allocation":  # each as fine as its file system tells it
                    maps[context] = run(["nbdinfo", f"--map={context}", uri])[1]
            client = NbdClient(socket, name)
            try:
                content = client.read(0, client.size) if client.size else b""
            finally:
                client.close()
            # Bitmaps are stored at a proper end.
            server.terminate()
            self.assertEqual(server.wait(LIMIT), 0)
            return export, maps, content
        finally:
            server.kill()
            server.wait()
            server.stderr.close()

    def test_what_is_served(self):
        def same(arguments):
            folder = self.own_folder()
            ours, theirs = (self.seen(p, arguments, folder) for p in self.programs)
            self.assertEqual(ours, theirs)
            shutil.rmtree(folder)
        self.side_by_side(rows(SERVED), same)

    def test_zeroes_and_discards(self):
        """What takes room afterwards, of 512 KiB that were data: they are discarded, or zeroes are
        written, or zeroes are written as such and may be a hole."""
        size = MIB
        for arguments in ((), ("--discard=ignore",), ("--discard=unmap",), ("--detect-zeroes=on",),
                          ("--discard=unmap", "--detect-zeroes=on"),
                          ("--discard=unmap", "--detect-zeroes=unmap")):
            for change in (lambda c: c.trim(0, size // 2),
                           lambda c: c.write(0, bytes(size // 2)),
                           lambda c: c.zero(0, size // 2),
                           lambda c: c.zero(0, size // 2, no_hole=True)):
                room = []
                for program in self.programs:
                    with open(self.path("full"), "wb") as f:
                        f.write(b"x" * size)
                    if os.path.exists(self.socket):
                        os.unlink(self.socket)
                    server = subprocess.Popen([program, "-k", self.socket, *arguments, "-f", "raw",
                                               "full"], cwd=self.dir, stderr=subprocess.DEVNULL)
                    try:
                        wait_until(lambda: os.path.exists(self.socket), LIMIT, "the socket is there")
                        client = self.connect()
                        change(client)
                        client.flush()
                        client.close()
                        self.assertEqual(server.wait(LIMIT), 0)
                    finally:
                        server.kill()
                        server.wait()
                    room.append(os.stat(self.path("full")).st_blocks * 512)
                self.assertEqual(*room, f"{arguments}")

    def connect(self):
        until = time.monotonic() + LIMIT
        while True:
            try:
                return NbdClient(self.socket, "")
            except ConnectionRefusedError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def test_labels_are_refused(self):
        status, text = self.ends(self.programs[0],
                                 ["-k", self.socket, "--selinux-label=x", "-f", "raw", "raw"])
        self.assertEqual(status, 1)
        self.assertIn("chcon", text)


if __name__ == "__main__":
    unittest.main()
