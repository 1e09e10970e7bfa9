# SPDX-License-Identifier: Apache-2.0
"""What is measured, on whom, and which ratios are the goals."""

import dataclasses
import re

from . import loads, servers, vmm


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    rw: str
    block: int
    depth: int
    connections: int = 1
    image: str = "small"
    direct: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """A server as it takes part in a group."""
    label: str
    server: object
    load: object          # a function of loads.py
    image: str = None     # overrides the case's
    image_format: str = "raw"
    only: str = ""        # a pattern of the cases it takes part in

    def takes_part(self, case):
        return re.search(self.only, case.name) is not None


@dataclasses.dataclass(frozen=True)
class Group:
    cases: list
    entries: list


@dataclasses.dataclass(frozen=True)
class Goal:
    """`ours` must reach `ratio` times the best of the entries that match `peers`."""
    case: str
    ours: str
    peers: str
    ratio: float


def _name(text, connections, choices):
    return f"{text} c{connections}" if len(choices) > 1 else text


def _random(prefix, depths, connections=(1,)):
    return [Case(_name(f"{prefix}/{rw} 4k d{d}", c, connections), rw, 4096, d, c)
            for rw in ("randread", "randwrite") for d in depths for c in connections]


def _sequential(prefix, connections=(1,)):
    return [Case(_name(f"{prefix}/{rw} 256k", c, connections), rw, 256 << 10, 8, c, "large")
            for rw in ("read", "write") for c in connections]


def _entries(load, *of):
    return [Entry(s.name, s, load) for s in of]


def nbd_group(tools):
    cases = _random("nbd", (1, 32), (1, 4)) + _sequential("nbd", (1, 4))
    entries = _entries(loads.nbd, servers.OurNbd(tools), servers.QemuNbd(tools, "threads"),
                       servers.QemuNbd(tools, "io_uring"), servers.Nbdkit(tools),
                       servers.Bare(tools, spin=False))
    spinning = servers.Bare(tools, spin=True)
    return Group(cases, entries + [Entry(spinning.name, spinning, loads.nbd, only="d1 c1$")])


def fuse_group(tools):
    cases = _random("fuse", (1, 32)) + _sequential("fuse")
    floor = servers.TheFile(tools, by_fio=False)
    fio = servers.TheFile(tools, by_fio=True)
    entries = _entries(loads.file, servers.OurFuse(tools),
                       servers.QemuStorageDaemonFuse(tools, "threads"),
                       servers.QemuStorageDaemonFuse(tools, "io_uring"),
                       servers.BareFuse(tools), floor)
    return Group(cases, entries + _entries(loads.fio, fio))


def qcow2_group(tools):
    ours = servers.OurNbd(tools)
    entries = [Entry("minivmm qcow2", ours, loads.nbd, "qcow2", "qcow2"),
               Entry("minivmm raw", ours, loads.nbd)]
    for aio in ("threads", "io_uring"):
        theirs = servers.QemuNbd(tools, aio)
        entries.append(Entry(f"{theirs.name} qcow2", theirs, loads.nbd, "qcow2", "qcow2"))
    return Group(_random("qcow2", (1, 32)), entries)


def runtime_group(tools):
    cases = [Case(f"runtime/randread 4k d{d}{' direct' if direct else ''}", "randread", 4096, d,
                  direct=direct) for d in (1, 32) for direct in (False, True)]
    return Group(cases, [Entry("minivmm graph", servers.TheFile(tools, by_fio=False), loads.graph),
                         Entry("fio/io_uring", servers.TheFile(tools, by_fio=True), loads.fio)])


def groups(tools):
    return [runtime_group(tools), nbd_group(tools), fuse_group(tools), qcow2_group(tools),
            Group(vmm.cases(Case), [Entry(m.name, m, vmm.load) for m in vmm.machines(tools)])]


GOALS = [
    Goal(r"^runtime/", "minivmm graph", r"^fio/", 0.9),
    Goal(r"^nbd/rand.* d32 ", "minivmm", r"^qemu-nbd/", 3.0),
    Goal(r"^nbd/rand.* d32 ", "minivmm", r"^nbdkit$", 2.0),
    Goal(r"^nbd/rand.* d1 ", "minivmm", r"^(qemu-nbd/|nbdkit$)", 0.95),
    Goal(r"^nbd/(read|write) ", "minivmm", r"^qemu-nbd/", 2.0),
    Goal(r"^fuse/rand.* d32$", "minivmm", r"^qsd/", 2.0),
    Goal(r"^qcow2/", "minivmm qcow2", r"^minivmm raw$", 0.9),
]

# Goals that are a number of ours alone: case, entry, at most, unit.
LIMITS = [
    ("vmm/start", "minivmm", 20.0, "ms"),
    ("vmm/memory", "minivmm", 12.0, "MiB"),
]
