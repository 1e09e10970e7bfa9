# SPDX-License-Identifier: Apache-2.0
"""Measures one case on one started server."""

import json
import os
import shutil
import time

from . import processes


class Tools:
    """Where the programs are."""

    def __init__(self, tool_dir, minivmm, probe):
        self._dir = tool_dir
        self.minivmm = minivmm
        self.probe = probe

    def tool(self, name):
        return f"{self._dir}/{name}"

    def lacks(self, name):
        if shutil.which(self.tool(name)):
            return None
        return f"{self.tool(name)} is not built (cmake -DMINIVMM_BENCH=ON)"

    def lacks_minivmm(self):
        if self.minivmm and shutil.which(self.minivmm):
            return None
        return f"no minivmm at {self.minivmm} (--minivmm PATH)"

    @staticmethod
    def lacks_fuse():
        try:
            with open("/dev/fuse", "rb"):
                return None
        except OSError as e:
            return f"/dev/fuse: {e.strerror}"


def _load(command, seconds, running):
    before = running.child.cpu_seconds() if running.child else 0
    out = processes.run(command, timeout=seconds + 40)
    after = running.child.cpu_seconds() if running.child else 0
    result = json.loads(out)
    result["server_cpu_seconds"] = after - before
    result.update(running.child.memory() if running.child else {})
    return result


def nbd(tools, case, running, seconds, ramp, seed):
    command = [tools.tool("nbd_load"), running.where, f"--rw={case.rw}", f"--bs={case.block}",
               f"--depth={case.depth}", f"--connections={case.connections}",
               f"--seconds={seconds}", f"--ramp={ramp}", f"--seed={seed}"]
    return _load(command, seconds, running)


def copy(_tools, case, running, _seconds, _ramp, _seed):
    """All of the image by nbdcopy, out of the server or into it."""
    names = [running.where, "null:"] if case.rw == "read" else [running.image, running.where]
    size = os.path.getsize(running.image)
    before = running.child.cpu_seconds()
    began = time.monotonic()
    processes.run(["nbdcopy", f"--request-size={case.block}", f"--requests={case.depth}",
                   f"--connections={case.connections}", *names], timeout=300)
    seconds = time.monotonic() - began
    blocks = size / case.block
    return {"value": size / seconds / 1e6, "unit": "MB/s", "errors": 0, "seconds": seconds,
            "requests": blocks, "server_cpu_seconds": running.child.cpu_seconds() - before,
            **running.child.memory(), "ramp": 0}


def file(tools, case, running, seconds, ramp, seed):
    """Through O_DIRECT on a mount, so that the server is asked and not the page cache; the image
    itself through the page cache, where the servers have it."""
    command = [tools.tool("file_load"), running.where, f"--rw={case.rw}", f"--bs={case.block}",
               f"--depth={case.depth}", f"--seconds={seconds}", f"--ramp={ramp}", f"--seed={seed}"]
    if running.child is None:
        command.append("--buffered")
    return _load(command, seconds, running)


def graph(tools, case, running, seconds, ramp, seed):
    """The image through one event loop and the block graph."""
    command = [tools.tool("graph_load"), running.where, f"--bs={case.block}",
               f"--depth={case.depth}", f"--seconds={seconds}", f"--ramp={ramp}", f"--seed={seed}"]
    return _load(command + (["--direct"] if case.direct else []), seconds, running)


def fio(_tools, case, running, seconds, _ramp, seed):
    """fio on the image itself, through the page cache (which fio would drop first if it were let).
    It counts whole seconds."""
    out = processes.run(
        ["fio", "--name=floor", f"--filename={running.where}", f"--rw={case.rw}",
         f"--bs={case.block}", "--ioengine=io_uring", "--invalidate=0",
         f"--iodepth={case.depth}", f"--direct={int(case.direct)}", "--time_based",
         f"--runtime={max(1, round(seconds))}", "--norandommap", f"--randseed={seed}",
         "--output-format=json"], timeout=seconds + 40)
    job = json.loads(out[out.index("{"):])["jobs"][0]
    side = job["read"] if case.rw.endswith("read") else job["write"]
    return {"iops": side["iops"], "mb_per_s": side["bw_bytes"] / 1e6,
            "latency_us": {"mean": side["clat_ns"]["mean"] / 1e3,
                           "p50": side["clat_ns"]["percentile"]["50.000000"] / 1e3,
                           "p99": side["clat_ns"]["percentile"]["99.000000"] / 1e3},
            "requests": side["total_ios"], "errors": job["error"], "seconds": seconds,
            "client_cpu_seconds": 0, "server_cpu_seconds": 0}
