# SPDX-License-Identifier: Apache-2.0
"""The probe guest's disk under our VMM and under QEMU microvm, the same ELF; start-up and memory.

'vmm/start' is exec to the guest's first byte on its serial line, in milliseconds: later than
the first KVM exit by what the guest runs until then, so never too kind. 'vmm/memory' is the
resident memory of the process less the mapping that is guest memory, in MiB, while the guest runs
its disk benchmark.
"""

import os
import re
import select
import shutil
import subprocess
import time

from . import processes
from .memory import resident_less_guest

GUEST_MIB = 256


def guest_job(case, seconds):
    """The probe guest's command line for a case (see images/probe)."""
    return f"job=bench:disk=0:rw={case.rw}:bs={case.block}:depth={case.depth}:seconds={seconds}"


def cases(make):
    loads = [make(f"vmm/{rw} 4k d{d}", rw, 4096, d) for rw in ("randread", "randwrite")
             for d in (1, 32)]
    return loads + [make("vmm/start", "start", 0, 0), make("vmm/memory", "memory", 0, 0)]


class Machine:
    """A VMM; start() only hands out the image, since each load is one boot."""

    name = ""
    peer = True

    def __init__(self, tools):
        self.tools = tools

    def missing(self):
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return "/dev/kvm is not there or not allowed"
        return self.lacks()

    def lacks(self):
        raise NotImplementedError

    def command(self, image, job):
        raise NotImplementedError

    def start(self, workplace, image, image_format):
        return Boot(self, image)


class Boot:
    child = None

    def __init__(self, machine, image):
        self.machine = machine
        self.image = image

    def stop(self):
        pass


class OurMachine(Machine):
    name = "minivmm"
    peer = False

    def lacks(self):
        return self.tools.lacks_minivmm()

    def command(self, image, job):
        return [self.tools.minivmm, "boot", "--memory", f"{GUEST_MIB}M",
                "--disk", f"{image},id=disk0,format=raw", "--append", job]


class QemuMicrovm(Machine):
    def __init__(self, tools, aio):
        super().__init__(tools)
        self.aio = aio
        self.name = f"qemu microvm/{aio}"

    def lacks(self):
        if not shutil.which("qemu-system-x86_64"):
            return "qemu-system-x86_64 is not installed"
        if not self.tools.probe or not os.path.exists(self.tools.probe):
            return f"no probe guest at {self.tools.probe} (--probe PATH)"
        return None

    # Without ACPI it tells the guest of its virtio-mmio devices on the command line.
    def command(self, image, job):
        return ["qemu-system-x86_64", "-M", "microvm,accel=kvm,acpi=off",
                "-global", "virtio-mmio.force-legacy=false", "-m", str(GUEST_MIB),
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-serial", "stdio", "-kernel", self.tools.probe, "-append", job,
                "-drive",
                f"if=none,id=d0,file={image},format=raw,cache=writeback,aio={self.aio}",
                "-device", "virtio-blk-device,drive=d0"]


class BareKvm(Machine):
    """The physical limit: one page, one processor, one exit; with `pc` what any PC must have too."""

    def __init__(self, tools, pc):
        super().__init__(tools)
        self.pc = pc
        self.name = "bare kvm/pc" if pc else "bare kvm"
        self.peer = False

    def lacks(self):
        return self.tools.lacks("bare_kvm")

    def command(self, image, job):
        return [self.tools.tool("bare_kvm")] + (["--pc"] if self.pc else [])


def machines(tools):
    return [OurMachine(tools)] + [QemuMicrovm(tools, aio) for aio in ("threads", "io_uring")]


def limits(tools):
    return [BareKvm(tools, pc) for pc in (False, True)]


def load(_tools, case, boot, seconds, _ramp, _seed):
    if case.rw == "start":
        return _start_time(boot)
    if case.rw == "memory":
        return _own_memory(boot, max(1, round(seconds)), case)
    return _guest_bench(boot, max(1, round(seconds)), case)


def _guest_bench(boot, seconds, case):
    """Ends the machine itself when the guest says that it is done: not every VMM understands each
    way in which a guest can end."""
    process = _spawn(boot, guest_job(case, seconds))
    try:
        out = _read_until(process.stdout, b"probe: done", seconds + 60)
    finally:
        _end(process)
    found = re.search(r"\biops=(\d+)", out)
    if not found:
        raise processes.Failed(f"{boot.machine.name}: the guest told no iops: {out[-400:]}")
    latency = re.search(r"\blat_p50_us=([\d.]+)", out)
    return {"iops": float(found.group(1)), "seconds": seconds,
            "latency_us": {"p50": float(latency.group(1)) if latency else 0.0}}


def _read_until(stream, mark, timeout):
    deadline = time.monotonic() + timeout
    out = b""
    while mark not in out:
        left = deadline - time.monotonic()
        readable = left > 0 and select.select([stream], [], [], left)[0]
        chunk = os.read(stream.fileno(), 65536) if readable else b""
        if not chunk:
            break
        out += chunk
    return out.decode(errors="replace")


def _spawn(boot, job):
    return subprocess.Popen(boot.machine.command(boot.image, job), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            preexec_fn=processes.die_with_parent)


def _end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def _start_time(boot, timeout=20.0):
    began = time.monotonic()
    process = _spawn(boot, "job=info")
    try:
        readable = select.select([process.stdout], [], [], timeout)[0]
        took = time.monotonic() - began
        out = _read_until(process.stdout, b"probe:", timeout) if readable else ""
    finally:
        _end(process)
    if "probe:" not in out:
        raise processes.Failed(f"{boot.machine.name}: the guest says nothing: {out[-400:]}")
    return {"value": took * 1e3, "unit": "ms"}


def _own_memory(boot, seconds, case):
    process = _spawn(boot, guest_job(case.__class__("", "randread", 4096, 32), seconds + 2))
    try:
        time.sleep(seconds)
        if process.poll() is not None:
            raise processes.Failed(f"{boot.machine.name}: the guest ended early")
        total = resident_less_guest(process.pid, GUEST_MIB << 20)
    finally:
        _end(process)
    return {"value": total / (1 << 20), "unit": "MiB"}
