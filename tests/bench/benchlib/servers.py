# SPDX-License-Identifier: Apache-2.0
"""The servers that are measured: each starts on an image and says where its data can be loaded.

A server lives for one measurement, so that none is disturbed by another's threads or image locks,
and a crash costs one point. Start-up is not part of what is measured.
"""

import os
import shutil
import socket

from . import processes, tls


def _accepts(family, address):
    s = socket.socket(family, socket.SOCK_STREAM)
    try:
        s.connect(address)
        return True
    except OSError:
        return False
    finally:
        s.close()


class Server:
    """A kind of server. `missing()` says what it lacks on this machine, or None."""

    name = ""
    peer = True  # someone else's program

    def __init__(self, tools):
        self.tools = tools

    def missing(self):
        return None

    def start(self, workplace, image, image_format):
        """Returns a Running."""
        raise NotImplementedError


class Running:
    """A started server: `where` is a URI or a path for the load generator."""

    def __init__(self, child, where, workplace, mount=None, log=None, image=None):
        self.child = child
        self.where = where
        self.image = image
        self._workplace = workplace
        self._mount = mount
        self._log = log

    def stop(self):
        if self.child is not None:
            self.child.stop()
        if self._mount is not None:
            self._workplace.release(self._mount)
        if self._log is not None and os.path.exists(self._log):
            os.unlink(self._log)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Place:
    """Where an NBD server listens: a unix socket, or a port of loopback; with TLS or not."""

    def __init__(self, workplace, tcp, secret=None):
        self.port = _free_port() if tcp else None
        self.path = None if tcp else workplace.new("nbd.sock")
        self.secret = secret  # tls.Keys, tls.Certificates or None

    def uri(self, export=""):
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{export}".rstrip("/")
        if self.secret:
            return self.secret.uri(export, self.path)
        return f"nbd+unix:///{export}?socket={self.path}"

    def listen_uri(self):
        """For a server whose options have the secret."""
        return self.uri() if self.port else f"nbd+unix:///?socket={self.path}"

    def listens(self):
        if self.port:
            return _accepts(socket.AF_INET, ("127.0.0.1", self.port))
        return os.path.exists(self.path) and _accepts(socket.AF_UNIX, self.path)


class NbdServer(Server):
    export = ""
    tcp = False
    secret = None

    def over_tcp(self):
        self.tcp = True
        return self

    def with_tls(self, kind):
        """`kind`: tls.Keys or tls.Certificates."""
        self.secret = kind
        return self

    def command(self, place, image, image_format):
        raise NotImplementedError

    def start(self, workplace, image, image_format):
        place = Place(workplace, self.tcp, self.secret and self.secret.of(workplace))
        log = workplace.new("log")
        child = processes.Child(self.command(place, image, image_format), log)
        try:
            child.wait_until(place.listens)
        except processes.Failed:
            child.stop()
            raise
        return Running(child, place.uri(self.export), workplace, log=log, image=image)


class OurNbd(NbdServer):
    name = "minivmm"
    peer = False
    export = "disk0"

    def missing(self):
        return self.tools.lacks_minivmm()

    def command(self, place, image, image_format):
        secure = ",tls-creds=tls0" if place.secret else ""
        return [self.tools.minivmm, "serve", "--disk", f"{image},id=disk0,format={image_format}",
                *(["--object", place.secret.qemu_object()] if place.secret else []),
                "--nbd", place.listen_uri() + secure, "--export", "disk0,writable"]


class QemuNbd(NbdServer):
    def __init__(self, tools, aio):
        super().__init__(tools)
        self.aio = aio
        self.name = f"qemu-nbd/{aio}"

    def missing(self):
        return None if shutil.which("qemu-nbd") else "qemu-nbd is not installed"

    def command(self, place, image, image_format):
        where = ["-b", "127.0.0.1", "-p", place.port] if place.port else ["-k", place.path]
        secret = place.secret
        secure = ["--object", secret.qemu_object(), "--tls-creds", "tls0"] if secret else []
        return ["qemu-nbd", "-t", "-f", image_format, *where, "-e", "16", *secure,
                "--cache=writeback", f"--aio={self.aio}", image]


class Nbdkit(NbdServer):
    name = "nbdkit"

    def missing(self):
        return None if shutil.which("nbdkit") else "nbdkit is not installed"

    def command(self, place, image, image_format):
        where = ["-i", "127.0.0.1", "-p", place.port] if place.port else ["-U", place.path]
        secure = ["--tls=require", place.secret.nbdkit_option()] if place.secret else []
        return ["nbdkit", "-f", *where, *secure, "file", image]


class Bare(NbdServer):
    peer = False

    def __init__(self, tools, spin):
        super().__init__(tools)
        self.spin = spin
        self.name = "bare/spin" if spin else "bare"

    def missing(self):
        return self.tools.lacks("bare_server")

    def command(self, place, image, image_format):
        spin = ["--spin-us=50"] if self.spin else []
        return [self.tools.tool("bare_server"), f"--file={image}", f"--listen={place.uri()}"] + spin


class OurFuse(Server):
    name = "minivmm"
    peer = False

    def missing(self):
        return self.tools.lacks_minivmm() or self.tools.lacks_fuse()

    def start(self, workplace, image, image_format):
        mount = workplace.mount_point("fuse", is_file=False)
        log = workplace.new("log")
        child = processes.Child(
            [self.tools.minivmm, "serve", "--disk", f"{image},id=disk0,format={image_format}",
             "--fuse", mount, "--export", "disk0,writable"], log)
        path = os.path.join(mount, "disk0")
        return _mounted(child, path, lambda: os.path.exists(path), workplace, mount, log)


class QemuStorageDaemonFuse(Server):
    def __init__(self, tools, aio):
        super().__init__(tools)
        self.aio = aio
        self.name = f"qsd/{aio}"

    def missing(self):
        if not shutil.which("qemu-storage-daemon"):
            return "qemu-storage-daemon is not installed"
        return self.tools.lacks_fuse()

    def start(self, workplace, image, image_format):
        mount = workplace.mount_point("fuse", is_file=True)
        log = workplace.new("log")
        child = processes.Child(
            ["qemu-storage-daemon",
             "--blockdev", f"driver=file,filename={image},node-name=f,aio={self.aio}",
             "--blockdev", f"driver={image_format},file=f,node-name=d",
             "--export", f"type=fuse,id=e,node-name=d,mountpoint={mount},writable=on"], log)
        return _mounted(child, mount, lambda: os.path.getsize(mount) > 0, workplace, mount, log)


class BareFuse(Server):
    """The limit: threads that read a request, pread, and write the answer."""

    name = "bare"
    peer = False

    def missing(self):
        if os.geteuid() != 0:
            return "bare_fuse needs root to mount"
        return self.tools.lacks("bare_fuse") or self.tools.lacks_fuse()

    def start(self, workplace, image, image_format):
        mount = workplace.mount_point("fuse", is_file=True)
        log = workplace.new("log")
        child = processes.Child([self.tools.tool("bare_fuse"), f"--file={image}",
                                 f"--mount={mount}", "--threads=4"], log)
        return _mounted(child, mount, lambda: os.path.getsize(mount) > 0, workplace, mount, log)


def _mounted(child, path, ready, workplace, mount, log):
    try:
        child.wait_until(ready)
    except (processes.Failed, OSError) as e:
        child.stop()
        workplace.release(mount)
        raise processes.Failed(str(e)) from None
    return Running(child, path, workplace, mount, log)


class TheFile(Server):
    """No server at all: the floor. Loaded by our generator or by fio."""

    peer = False

    def __init__(self, tools, by_fio):
        super().__init__(tools)
        self.by_fio = by_fio
        self.name = "fio on the file" if by_fio else "the file"

    def missing(self):
        if self.by_fio and not shutil.which("fio"):
            return "fio is not installed"
        return None

    def start(self, workplace, image, image_format):
        return Running(None, image, workplace)
