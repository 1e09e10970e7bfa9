# SPDX-License-Identifier: Apache-2.0
"""One `minivmm boot` or `minivmm serve` under test.

Every wait has a limit; what did not come in time is an error that shows what the process said.
"""

import fcntl
import os
import select
import signal
import subprocess
import threading
import time

START_LIMIT = 30.0  # seconds; sanitizer builds on a loaded machine are slow
END_LIMIT = 30.0


def minivmm():
    """The program under test."""
    path = os.environ.get("MINIVMM")
    if not path:
        raise RuntimeError("set MINIVMM to the path of the minivmm program")
    return os.path.abspath(path)


class StartFailed(Exception):
    def __init__(self, status, text):
        super().__init__(f"exit status {status}: {text}")
        self.status = status
        self.text = text


class Lines:
    """Collects a pipe's lines in a thread; others wait for one that matches."""

    def __init__(self, pipe):
        self._pipe = pipe
        self._changed = threading.Condition()
        self.lines = []
        self.partial = ""  # the end of the output, if it is no whole line
        self.ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        for raw in self._pipe:
            text = raw.decode("utf-8", "replace")
            with self._changed:
                if text.endswith("\n"):
                    self.lines.append(text.rstrip("\r\n"))
                else:
                    self.partial = text
                self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def count(self):
        with self._changed:
            return len(self.lines)

    def wait(self, matches, start=0, limit=30.0):
        """The first line from index `start` on for which matches(line) is true, with its index."""
        until = time.monotonic() + limit
        at = start
        with self._changed:
            while True:
                while at < len(self.lines):
                    if matches(self.lines[at]):
                        return at, self.lines[at]
                    at += 1
                left = until - time.monotonic()
                if self.ended or left <= 0:
                    why = "the output ended" if self.ended else f"nothing within {limit} s"
                    tail = "\n".join(self.lines[-20:])
                    raise TimeoutError(f"{why}; the last lines were:\n{tail}")
                self._changed.wait(left)

    def text(self):
        """Everything, once the pipe is closed."""
        self._thread.join(END_LIMIT)
        return "\n".join([*self.lines, self.partial]).strip()


class Daemon:
    """Starts the process; `wait_ready` returns when it said that it can be used."""

    def __init__(self, arguments, cwd, env=None, prefix=(), extra_fds=(), own_ready=True):
        read_end, low = os.pipe()
        # Out of the way of descriptors that a test hands over by number.
        write_end = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 60)
        os.close(low)
        command = [*prefix, minivmm(), *arguments]
        if own_ready:
            command += ["--ready-fd", str(write_end)]
        self.cwd = cwd
        self.process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **(env or {})},
            pass_fds=[*([write_end] if own_ready else []), *extra_fds])
        os.close(write_end)
        self._ready_fd = read_end
        self.output = Lines(self.process.stdout)
        self.errors = Lines(self.process.stderr)

    @property
    def pid(self):
        return self.process.pid

    def wait_ready(self, limit=START_LIMIT):
        """Throws StartFailed with what the process said if it ends instead."""
        got = b""
        until = time.monotonic() + limit
        while not got.endswith(b"READY\n"):
            if not select.select([self._ready_fd], [], [], max(0, until - time.monotonic()))[0]:
                self.process.kill()
                raise TimeoutError(f"not ready after {limit} s: {self.errors.text()}")
            piece = os.read(self._ready_fd, 64)
            if not piece:
                status = self.wait(limit)
                raise StartFailed(status, self.errors.text())
            got += piece
        return self

    def wait(self, limit=END_LIMIT):
        """The exit status."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
            raise TimeoutError(f"still running after {limit} s: {self.errors.text()}") from None

    def send(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGTERM, limit=END_LIMIT):
        """Asks it to end; returns the exit status."""
        self.send(number)
        return self.wait(limit)

    def kill(self):
        """kill -9, and the process is gone when this returns."""
        self.process.kill()
        self.process.wait(30)

    def cleanup(self):
        if self.process.poll() is None:
            self.kill()
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                pipe.close()
            except OSError:
                pass

    # --- The probe guest's shell, with `--append job=shell:echo=off` ---

    def type(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def wait_shell(self, limit=START_LIMIT):
        return self.output.wait(lambda l: l.startswith("probe: shell"), 0, limit)

    def begin_job(self, line):
        """Types a job; returns what job_result needs."""
        start = self.output.count()
        self.type(line)
        return start, line.split()[0]

    def job_result(self, begun, limit=60.0):
        """(ok, values of the result line, the line)."""
        start, name = begun
        _, line = self.output.wait(
            lambda l: l.startswith((f"probe: {name} ok", f"probe: {name} FAILED")), start, limit)
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        return line.startswith(f"probe: {name} ok"), values, line

    def job(self, line, limit=60.0):
        """Runs a job that must succeed; returns its values."""
        ok, values, text = self.job_result(self.begin_job(line), limit)
        if not ok:
            raise AssertionError(f"guest job '{line}': {text}")
        return values

    def failed_job(self, line, limit=60.0):
        """Runs a job that must fail; returns the result line."""
        ok, _, text = self.job_result(self.begin_job(line), limit)
        if ok:
            raise AssertionError(f"guest job '{line}' should have failed: {text}")
        return text


SHELL = "job=shell:echo=off"
