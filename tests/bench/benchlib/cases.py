# SPDX-License-Identifier: Apache-2.0
"""What is measured, on whom, and which ratios are the goals."""

import dataclasses
import re
import shutil

from . import loads, servers, tls, vmm


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
    """`ours` must reach `ratio` times the best of the entries that match `peers`; of `cpu`, the
    server's CPU time a request, and where less is better, it may have at most `ratio` times theirs."""
    case: str
    ours: str
    peers: str
    ratio: float
    cpu: bool = False
    less: bool = False  # is better


def _name(text, connections, choices):
    return f"{text} c{connections}" if len(choices) > 1 else text


def _random(prefix, depths, connections=(1,)):
    return [Case(_name(f"{prefix}/{rw} 4k d{d}", c, connections), rw, 4096, d, c)
            for rw in ("randread", "randwrite") for d in depths for c in connections]


def _sequential(prefix, connections=(1,), sizes=(256,)):
    return [Case(_name(f"{prefix}/{rw} {f'{kib}k' if kib < 1024 else f'{kib >> 10}m'}", c,
                       connections), rw, kib << 10, 8, c, "large")
            for rw in ("read", "write") for kib in sizes for c in connections]


def _entries(load, *of):
    return [Entry(s.name, s, load) for s in of]


def nbd_group(tools):
    cases = _random("nbd", (1, 32, 128), (1, 4)) + _sequential("nbd", (1, 4), (256, 4096))
    entries = _entries(loads.nbd, servers.OurNbd(tools), servers.QemuNbd(tools, "threads"),
                       servers.QemuNbd(tools, "io_uring"), servers.Nbdkit(tools),
                       servers.Bare(tools, spin=False))
    spinning = servers.Bare(tools, spin=True)
    return Group(cases, entries + [Entry(spinning.name, spinning, loads.nbd, only="d1 c1$")])


def nbd_tcp_group(tools):
    """The same by TCP on loopback, where the socket costs more than the server."""
    cases = _random("nbd-tcp", (1, 32, 128), (1, 4)) + _sequential("nbd-tcp", (1, 4), (256, 4096))
    kinds = [servers.OurNbd(tools), servers.QemuNbd(tools, "threads"), servers.Nbdkit(tools),
             servers.Bare(tools, spin=False)]
    return Group(cases, _entries(loads.nbd, *(s.over_tcp() for s in kinds)))


def nbd_copy_group(tools):
    if not shutil.which("nbdcopy"):
        return Group([], [])
    cases = [Case(f"nbd-copy/{rw}", rw, 256 << 10, 64, 4, "large") for rw in ("read", "write")]
    return Group(cases, _entries(loads.copy, servers.OurNbd(tools),
                                 servers.QemuNbd(tools, "threads"), servers.Nbdkit(tools)))


def nbd_tls_group(tools, kind):
    """The client is nbdcopy: it knows TLS. It encrypts as much as the server, so what differs
    between servers is their CPU time more than the rate."""
    if not shutil.which("nbdcopy"):
        return Group([], [])
    prefix = f"nbd-tls-{kind.kind}"
    cases = [Case(_name(f"{prefix}/{rw} {text}", c, (1, 4)), rw, block, depth, c, "large")
             for rw in ("read", "write")
             for text, block, depth in (("4k d32", 4096, 32), ("256k", 256 << 10, 8))
             for c in (1, 4)]
    servers_with_tls = [s.with_tls(kind) for s in (servers.OurNbd(tools),
                                                   servers.QemuNbd(tools, "threads"),
                                                   servers.Nbdkit(tools))]
    return Group(cases, _entries(loads.copy, *servers_with_tls))


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
    return Group(_random("qcow2", (1, 32, 128)), entries)


def runtime_group(tools):
    cases = [Case(f"runtime/randread 4k d{d}{' direct' if direct else ''}", "randread", 4096, d,
                  direct=direct) for d in (1, 32) for direct in (False, True)]
    return Group(cases, [Entry("minivmm graph", servers.TheFile(tools, by_fio=False), loads.graph),
                         Entry("fio/io_uring", servers.TheFile(tools, by_fio=True), loads.fio)])


def vmm_group(tools):
    entries = _entries(vmm.load, *vmm.machines(tools))
    return Group(vmm.cases(Case), entries + [Entry(m.name, m, vmm.load, only="start|memory")
                                             for m in vmm.limits(tools)])


def groups(tools):
    return [runtime_group(tools), nbd_group(tools), nbd_tcp_group(tools), nbd_copy_group(tools),
            nbd_tls_group(tools, tls.Keys), nbd_tls_group(tools, tls.Certificates),
            fuse_group(tools), qcow2_group(tools),
            vmm_group(tools)]


GOALS = [
    Goal(r"^runtime/", "minivmm graph", r"^fio/", 0.9),
    # Everywhere at least the best peer.
    Goal(r"^(nbd|nbd-tcp|nbd-copy|nbd-tls-psk|nbd-tls-x509)/", "minivmm", r"^(qemu-nbd/|nbdkit$)",
         1.0),
    Goal(r"^nbd-tls-", "minivmm", r"^(qemu-nbd/|nbdkit$)", 1.0, cpu=True),
    Goal(r"^nbd/randread 4k d32 c1$", "minivmm", r"^qemu-nbd/", 5.0),
    Goal(r"^nbd/randread 4k d32 c1$", "minivmm", r"^nbdkit$", 3.0),
    Goal(r"^nbd/randread 4k d32 ", "minivmm", r"^bare$", 0.6),
    Goal(r"^nbd/randread 4k d32 ", "minivmm", r"^nbdkit$", 0.5, cpu=True),
    Goal(r"^nbd/randread 4k d1 c1$", "minivmm", r"^bare/spin$", 0.85),
    Goal(r"^nbd/read (256k|4m) ", "minivmm", r"^bare$", 0.85),
    Goal(r"^nbd/(read|write) (256k|4m) ", "minivmm", r"^qemu-nbd/", 2.5),
    Goal(r"^fuse/rand.* d32$", "minivmm", r"^qsd/", 2.0),
    Goal(r"^qcow2/", "minivmm qcow2", r"^minivmm raw$", 0.9),
    Goal(r"^vmm/start$", "minivmm", r"^qemu microvm/", 1 / 3, less=True),
    Goal(r"^vmm/memory$", "minivmm", r"^qemu microvm/", 1 / 4, less=True),
]

# Goals that are a number of ours alone: case, entry, at most, unit.
LIMITS = [
    ("vmm/start", "minivmm", 20.0, "ms"),
    ("vmm/memory", "minivmm", 12.0, "MiB"),
]
