# SPDX-License-Identifier: Apache-2.0
"""Child processes that do not outlive the benchmark, and mounts that do not stay behind."""

import atexit
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A server or a load did not work; the text says why."""


def die_with_parent():
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A server process. Its output goes to a log whose end is part of a failure's text."""

    _alive = set()

    def __init__(self, command, log):
        self.command = [str(part) for part in command]
        self._log_path = log
        self._log = open(log, "wb")
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent)
        Child._alive.add(self)

    @property
    def pid(self):
        return self.process.pid

    def log_end(self):
        with open(self._log_path, "rb") as f:
            return f.read()[-600:].decode(errors="replace").strip()

    def fail(self, what):
        raise Failed(f"{what}: {' '.join(self.command)}: {self.log_end()}")

    def wait_until(self, ready, timeout=10.0):
        """Polls ready() until it is true; Failed when the process ends or time runs out."""
        deadline = time.monotonic() + timeout
        while not ready():
            if self.process.poll() is not None:
                self.fail(f"ended with status {self.process.returncode} before it was ready")
            if time.monotonic() > deadline:
                self.fail("not ready in time")
            time.sleep(0.005)

    def cpu_seconds(self):
        """User and system time of all its threads so far."""
        try:
            with open(f"/proc/{self.pid}/stat", "rb") as f:
                fields = f.read().rsplit(b")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """MiB: the most memory of its own that it had so far, and what it has mapped of files, which
        is the page cache's."""
        fields = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}
        try:
            with open(f"/proc/{self.pid}/status", encoding="utf-8") as f:
                for name, _, value in (line.partition(":") for line in f):
                    if name in fields:
                        fields[name] = int(value.split()[0]) / 1024
        except OSError:
            pass
        # The kernel notes the most in steps.
        return {"server_peak_mib": max(fields["VmHWM"] - fields["RssFile"], fields["RssAnon"]),
                "server_files_mib": fields["RssFile"]}

    def stop(self, timeout=5.0):
        """SIGTERM, then SIGKILL. Returns whether it ended by itself."""
        gentle = True
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                gentle = False
                self.process.kill()
                self.process.wait()
        self._log.close()
        Child._alive.discard(self)
        return gentle

    @classmethod
    def stop_all(cls):
        for child in list(cls._alive):
            child.stop(timeout=1.0)


def run(command, timeout, ok=(0,)):
    """Runs a command to its end and returns its output; Failed on another status or too long."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=timeout, preexec_fn=die_with_parent, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"took over {timeout:.0f} s: {' '.join(command)}") from None
    if done.returncode not in ok:
        text = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise Failed(f"status {done.returncode}: {' '.join(command)}: {text[-600:]}")
    return done.stdout.decode(errors="replace")


def unmount(path):
    """Takes away a FUSE mount, also a dead one; nothing happens when there is none."""
    tool = shutil.which("fusermount3") or shutil.which("fusermount")
    if tool:
        subprocess.run([tool, "-u", "-z", "-q", str(path)], capture_output=True, check=False)


class Workplace:
    """A temporary folder for images, sockets and mounts. Everything in it goes at the end, also
    after an exception, SIGINT or SIGTERM."""

    def __init__(self, parent):
        if parent:
            os.makedirs(parent, exist_ok=True)
        self.path = tempfile.mkdtemp(prefix="minivmm-bench-", dir=parent)
        self._mounts = []
        self._count = 0
        atexit.register(self.close)

    def new(self, name):
        """A path that was not used before: sockets left by a killed server do no harm."""
        self._count += 1
        return os.path.join(self.path, f"{self._count}-{name}")

    def file(self, name):
        return os.path.join(self.path, name)

    def mount_point(self, name, is_file):
        path = self.new(name)
        if is_file:
            open(path, "wb").close()
        else:
            os.mkdir(path)
        self._mounts.append(path)
        return path

    def release(self, path):
        unmount(path)
        self._mounts.remove(path)

    def close(self):
        Child.stop_all()
        for path in list(self._mounts):
            self.release(path)
        shutil.rmtree(self.path, ignore_errors=True)


def exit_on_signals():
    """SIGTERM ends the run like SIGINT: through the clean-up."""
    def leave(number, _frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
