#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The Linux kernel's own NBD client on our server, attached by nbd-client, `minivmm nbd` and qemu-nbd: a
file system on /dev/nbd0 with one and with four connections, TLS, and a server that is killed meanwhile.
The client is Debian's stock kernel on an emulated machine whose network ends at this host's loopback;
client.sh is what it does."""

import os
import re
import shutil
import socket
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "linux"))
from stock import PACKAGES, StockKernel
from emulated_host import EmulatedHost, linux
from harness.daemon import minivmm
from harness.scene import MIB, run

LIMIT = 120.0  # seconds; where nothing else runs 20 are enough
SIZE = 192 * MIB


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class KernelClient(StockKernel):
    def client(self, port, tls_port):
        tree = linux.root(self.busybox)
        tree.file("work/outer.sh", os.path.join(HERE, "client.sh"))
        tree.text("work/settings", f"PORT={port}\nTLS_PORT={tls_port}\n")
        tree.file("work/keys.psk", self.path("keys.psk"))
        for program in ("nbd-client", "nbdinfo", "mke2fs", "e2fsck"):
            path = shutil.which(program)
            self.assertIsNotNone(path, f"{program} is not installed")
            tree.program(path, f"sbin/{program}")
        subprocess.run(["strip", "-o", self.path("minivmm"), minivmm()], check=True)
        tree.program(self.path("minivmm"), "work/minivmm")
        return EmulatedHost(
            self.dir, PACKAGES, tree, size=160 * MIB, modules=("virtio_net", "nbd", "vsock_loopback"),
            devices=("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="))

    def file_sum(self, image):
        """The sum of /large in the image's file system."""
        self.tool("convert", "-O", "raw", self.path(image), self.path("whole.raw"))
        status, text = run(["e2fsck", "-f", "-n", self.path("whole.raw")])
        self.assertEqual(status, 0, text)
        subprocess.run(["debugfs", "-R", f"dump /large {self.path('large')}",
                        self.path("whole.raw")], check=True, stderr=subprocess.DEVNULL)
        status, text = run(["sha256sum", self.path("large")])
        return text.split()[0]

    def test_a_file_system_over_the_kernels_driver(self):
        port, tls_port = free_port(), free_port()
        names = ("disk1", "disk4", "readonly")
        disks, exports = [], []
        for name in names:
            self.create(f"{name}.qcow2", SIZE, "-f", "qcow2")
            writable = "" if name == "readonly" else ",writable"
            disks += ["--disk", f"{self.path(name)}.qcow2,id={name}"]
            exports += ["--export", f"{name}{writable}"]
        self.create("secret.raw", 8 * MIB, "-f", "raw")
        with open(self.path("keys.psk"), "w", encoding="ascii") as keys:
            keys.write("alice:" + os.urandom(32).hex() + "\n")
        server = self.daemon("serve", *disks, *exports, "--io-threads", "2",
                             "--nbd", f"nbd://127.0.0.1:{port}",
                             "--object", f"tls-creds-psk,id=k,endpoint=server,dir={self.dir}",
                             "--nbd", f"nbd://127.0.0.1:{tls_port},tls-creds=k",
                             "--disk", f"{self.path('secret.raw')},format=raw,id=secret",
                             "--export", "secret,writable,allow=alice")
        text = "\n".join(self.client(port, tls_port).run(LIMIT))

        def said(line):
            self.assertRegex(text, rf"(?m)^CLIENT {line}$")
            return re.search(rf"(?m)^CLIENT {line}$", text)

        self.assertNotIn("FAILED", text)
        for connections in (1, 4):
            name = f"disk{connections}"
            said(f"{name} size {SIZE // 512}")
            for step in ("attach {} {}", "mkfs {}", "mount {}", "fstrim {}", "umount {}", "e2fsck {}",
                         "detach {}", "mount again {}", "{} content", "detach {} again"):
                said(step.format(name, connections) + " ok")
        said("readonly ro 1")
        said("readonly write refused")
        for what in ("busy", "no device", "unknown", "tls needed", "tls user", "tls busy", "qemu busy", "qemu no image"):
            said(f"refuse {what} ok")
        said("free /dev/nbd0 4096 1")
        said("detach free ok")
        said(f"tls /dev/nbd0 size {8 * MIB // 512} proxies 1")
        for step in ("tls write", "tls content", "detach tls", "tls end", "tls persist end"):
            said(f"{step} ok")
        for name in ("persist", "tls persist"):
            for step in (f"{name} write", f"{name} content", f"{name} connected", f"detach {name}"):
                said(f"{step} ok")
            said(f"{name} status 0")
        said(f"qemu size {8 * MIB // 512} ro 0")
        said("qemu ro 1")
        for step in ("connect", "write", "disconnect", "end", "content", "disconnect again", "read-only",
                     "killed", "verbose", "verbose disconnect", "nothing"):
            said(f"qemu {step} ok")
        said("qemu verbose status 0")
        said(f"vsock {8 * MIB}")
        said("vsock uri ok")
        said("end")
        self.assertEqual(server.stop(), 0, server.errors.text())
        status, secret = run(["sha256sum", self.path("secret.raw")])
        self.assertEqual(secret.split()[0], said(r"tls sum (\w+)").group(1))
        for name in ("disk1", "disk4"):
            self.check(f"{name}.qcow2")
            self.assertEqual(self.file_sum(f"{name}.qcow2"), said(rf"{name} sum (\w+)").group(1))
            # 10 MiB of large, 2.3 MiB of part, the file system's own: what was removed is gone.
            allocated = os.stat(self.path(f"{name}.qcow2")).st_blocks * 512
            self.assertLess(allocated, 32 * MIB)


if __name__ == "__main__":
    unittest.main()
