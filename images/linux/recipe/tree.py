# SPDX-License-Identifier: Apache-2.0
"""A tree of files for a guest, put together in memory and written as an initramfs or as an ext4
image. Needs neither root nor mounts."""

import os
import re
import shutil
import stat
import subprocess
import tempfile


class Tree:
    """Paths are the guest's, without a leading slash. What is added later wins."""

    def __init__(self):
        self._entries = {}  # path -> (mode, bytes, path of a file on the host, or None)

    def folder(self, path, mode=0o755):
        path = path.strip("/")
        parent = os.path.dirname(path)
        if parent and parent not in self._entries:
            self.folder(parent)
        if path and path not in self._entries:
            self._entries[path] = (stat.S_IFDIR | mode, None)

    def _put(self, path, mode, content):
        path = path.strip("/")
        self.folder(os.path.dirname(path))
        self._entries[path] = (mode, content)

    def text(self, path, text, mode=0o644):
        self._put(path, stat.S_IFREG | mode, text.encode())

    def file(self, path, source, mode=None):
        """A copy of a file of the host's."""
        if mode is None:
            mode = 0o755 if os.access(source, os.X_OK) else 0o644
        self._put(path, stat.S_IFREG | mode, os.path.abspath(source))

    def link(self, path, target):
        self._put(path, stat.S_IFLNK | 0o777, target.encode())

    def program(self, source, path=None):
        """A program of the host's with the libraries it loads, at the same places."""
        self.file(path or source, source, 0o755)
        done = subprocess.run(["ldd", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True, check=False)
        for library in re.findall(r"(/\S+) \(0x", done.stdout):
            self.file(library, library, 0o755)

    def busybox(self, source):
        self.file("bin/busybox", source, 0o755)
        applets = subprocess.run([source, "--list"], stdout=subprocess.PIPE, text=True,
                                 check=True).stdout.split()
        for applet in applets:
            if applet != "busybox" and not {f"bin/{applet}", f"sbin/{applet}"} & set(self._entries):
                self.link(f"bin/{applet}", "busybox")

    @staticmethod
    def _bytes(content):
        if isinstance(content, str):
            with open(content, "rb") as f:
                return f.read()
        return content or b""

    def write_initramfs(self, path):
        """An uncompressed cpio archive (newc): decompressing is what a slow guest waits for."""
        with open(path + ".new", "wb") as out:
            def pad():
                out.write(b"\0" * (-out.tell() % 4))
            def entry(number, name, mode, data):
                fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
                out.write(b"070701" + b"".join(b"%08x" % f for f in fields))
                out.write(name.encode() + b"\0")
                pad()
                out.write(data)
                pad()
            for number, name in enumerate(sorted(self._entries), 1):
                mode, content = self._entries[name]
                entry(number, name, mode, self._bytes(content))
            entry(0, "TRAILER!!!", 0, b"")
            out.write(b"\0" * (-out.tell() % 512))
        os.replace(path + ".new", path)

    def write_ext4(self, path, size, block_size=4096):
        """A raw image with an ext4 file system that owns the whole of it."""
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            for name in sorted(self._entries):
                mode, content = self._entries[name]
                target = os.path.join(folder, name)
                if stat.S_ISDIR(mode):
                    os.mkdir(target, stat.S_IMODE(mode))
                elif stat.S_ISLNK(mode):
                    os.symlink(content.decode(), target)
                elif isinstance(content, str):
                    shutil.copyfile(content, target)
                    os.chmod(target, stat.S_IMODE(mode))
                else:
                    with open(target, "wb") as f:
                        f.write(content or b"")
                    os.chmod(target, stat.S_IMODE(mode))
            new = path + ".new"
            with open(new, "wb") as f:
                f.truncate(size)
            environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
            done = subprocess.run(
                ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(block_size), "-L", "minivmm",
                 "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", "-d", folder, new],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
                env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"mke2fs: {done.stdout.strip()}")
        os.replace(path + ".new", path)
