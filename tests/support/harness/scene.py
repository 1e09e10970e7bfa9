# SPDX-License-Identifier: Apache-2.0
"""A test's folder with its images, daemons and mounts, and the taking away of all of them."""

import os
import random
import shutil
import subprocess
import tempfile
import time
import unittest

from .daemon import SHELL, Daemon, StartFailed, minivmm

SLOW = os.environ.get("MINIVMM_SLOW", "0") not in ("", "0")
MIB = 1 << 20


def have(*programs):
    return all(shutil.which(p) for p in programs)


def run(command, limit=60, **more):
    """Runs a program; returns (status, stdout and stderr)."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=limit, **more)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def is_mounted(path):
    path = os.path.realpath(path)
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == path for line in mounts)


def wait_until(true, limit, what):
    until = time.monotonic() + limit
    while not true():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {limit} s: {what}")
        time.sleep(0.01)


class Scene(unittest.TestCase):
    """Every test gets an empty folder, self.dir, on a file system that knows O_DIRECT."""

    def setUp(self):
        # Not /tmp: that may be a tmpfs.
        self.dir = tempfile.mkdtemp(prefix="minivmm-test.", dir=os.environ.get("TMPDIR", "/var/tmp"))
        self.addCleanup(self._remove)
        self._daemons = []
        seed = int(os.environ.get("MINIVMM_TEST_SEED", random.randrange(1 << 32)))
        print(f"{self.id()}: MINIVMM_TEST_SEED={seed}", flush=True)
        self.random = random.Random(seed)

    def _remove(self):
        for daemon in self._daemons:
            daemon.cleanup()
        with open("/proc/self/mounts", encoding="utf-8") as mounts:
            below = [l.split()[1] for l in mounts if l.split()[1].startswith(self.dir + "/")]
        for mount in reversed(below):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(self.dir, ignore_errors=True)

    def path(self, name):
        return os.path.join(self.dir, name)

    # --- Images ---

    def create(self, name, size, *options):
        """A new image by our own tool: options as of qemu-img create, -f and all."""
        self.tool("create", "-q", *options, self.path(name), str(size))

    def overlay(self, name, base, size, base_format="raw", cluster_size=65536):
        self.create(name, size, "-f", "qcow2", "-o", f"cluster_size={cluster_size}",
                    "-b", self.path(base), "-F", base_format)

    def tool(self, *arguments, limit=60):
        status, text = run([minivmm(), "image", *arguments], limit)
        self.assertEqual(status, 0, f"minivmm image {' '.join(arguments)}: {text}")
        return text

    def check(self, name, leaks_allowed=False):
        """Our check finds nothing wrong with a qcow2 image, and neither does qemu-img's."""
        allowed = (0, 3) if leaks_allowed else (0,)
        programs = [minivmm() + " image"] + (["qemu-img"] if have("qemu-img") else [])
        for program in programs:
            status, text = run([*program.split(), "check", "-f", "qcow2", self.path(name)], 120)
            self.assertIn(status, allowed, f"{program} check: {text}")

    # --- Daemons ---

    def daemon(self, *arguments, ready=True, **more):
        out = Daemon([str(a) for a in arguments], self.dir, **more)
        self._daemons.append(out)
        return out.wait_ready() if ready else out

    def boot(self, *arguments, **more):
        """A guest whose shell waits for jobs."""
        out = self.daemon("boot", "--memory", "64M", "--append", SHELL, *arguments, **more)
        out.wait_shell()
        return out

    def refused(self, *arguments, limit=30, **more):
        """Starts a daemon that must not come up: status 1. Returns what it said."""
        daemon = self.daemon(*arguments, ready=False, **more)
        with self.assertRaises(StartFailed) as caught:
            daemon.wait_ready(limit)
        self.assertEqual(caught.exception.status, 1, caught.exception.text)
        return caught.exception.text

    def assert_ended(self, daemon, status=0, number=None, limit=30):
        if number is not None:
            daemon.send(number)
        self.assertEqual(daemon.wait(limit), status, daemon.errors.text())
