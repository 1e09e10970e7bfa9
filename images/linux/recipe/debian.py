# SPDX-License-Identifier: Apache-2.0
"""Files out of Debian packages: a stock kernel with its modules, and busybox. What is installed is
taken from there; the rest is downloaded and unpacked into a folder, without being installed."""

import glob
import os
import re
import subprocess

KERNEL = "linux-image-cloud-amd64"


class NoPackage(Exception):
    """A package can be had neither here nor from the registry."""


def _run(*command, cwd=None):
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              cwd=cwd, check=False)
    except FileNotFoundError:
        raise NoPackage(f"needs the program {command[0]} (is this a Debian system?)") from None
    if done.returncode != 0:
        raise NoPackage(f"{' '.join(command)}: {done.stdout.strip()}")
    return done.stdout


def unpacked(package, folder):
    """The folder below `folder` that the package's files are in; downloaded the first time."""
    folder = os.path.abspath(folder)
    target = os.path.join(folder, package)
    if os.path.isdir(target):
        return target
    os.makedirs(folder, exist_ok=True)
    _run("apt-get", "download", "-qq", package, cwd=folder)
    archives = glob.glob(os.path.join(folder, f"{package}_*.deb"))
    if len(archives) != 1:
        raise NoPackage(f"apt-get download {package}: {len(archives)} files came")
    _run("dpkg-deb", "-x", archives[0], target + ".new")
    os.replace(target + ".new", target)
    os.remove(archives[0])
    return target


class Kernel:
    """A kernel and its modules below a root folder ('/' for an installed one)."""

    def __init__(self, root, version):
        self.root = root
        self.version = version
        self.image = os.path.join(root, "boot", f"vmlinuz-{version}")
        self._files = {}
        for path in glob.glob(os.path.join(root, "lib/modules", version, "**/*.ko"),
                              recursive=True):
            self._files[self._name(os.path.basename(path)[:-3])] = path

    @staticmethod
    def _name(module):
        return module.replace("-", "_")

    def modules(self, names):
        """The files of these modules and of what they need, in the order to load them."""
        out = []

        def add(name):
            path = self._files.get(self._name(name))
            if path is None:
                raise NoPackage(f"the kernel {self.version} has no module {name}")
            if path in out:
                return
            with open(path, "rb") as f:
                found = re.search(rb"\0depends=([^\0]*)\0", f.read())
            for needed in (found.group(1).decode().split(",") if found else []):
                if needed:
                    add(needed)
            out.append(path)

        for name in names:
            add(name)
        return out


def kernel(folder, package=KERNEL):
    """The installed cloud kernel, or the one that `package` stands for."""
    for image in sorted(glob.glob("/boot/vmlinuz-*-cloud-amd64"), reverse=True):
        version = os.path.basename(image)[len("vmlinuz-"):]
        if os.access(image, os.R_OK) and glob.glob(f"/lib/modules/{version}/kernel/fs/*/*.ko"):
            return Kernel("/", version)
    kept = sorted(glob.glob(os.path.join(folder, "linux-image-[0-9]*-cloud-amd64")), reverse=True)
    if kept:
        name = os.path.basename(kept[0])
    else:
        text = _run("apt-cache", "depends", package)
        found = re.search(r"Depends: (linux-image-[0-9]\S*)", text)
        if not found:
            raise NoPackage(f"apt-cache knows no kernel for {package}: apt-get update")
        name = found.group(1)
    root = unpacked(name, folder)
    return Kernel(root, name[len("linux-image-"):])


def busybox(folder):
    """A busybox that needs no libraries."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        if os.path.exists(path) and "not a dynamic" in subprocess.run(
                ["ldd", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                check=False).stdout:
            return path
    root = unpacked("busybox-static", folder)
    return next(p for p in (f"{root}/bin/busybox", f"{root}/usr/bin/busybox") if os.path.exists(p))
