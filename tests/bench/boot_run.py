#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What it costs to boot Linux: Debian's stock kernel, the same initramfs and the same qcow2 overlay
under minivmm and under QEMU microvm, one after the other, round by round. Times are from exec to the
kernel's first output (both with the kernel unpacking itself before) and to the first line of init;
memory is what is resident when init runs, less the guest's own. What start-up costs without a kernel's
part in it is `vmm/start` of run.py.

Where KVM has no hardware virtualization both run in an emulated machine that has it
(tests/system/linux/emulated_host.py): times are then those of an emulated processor, good for
comparing, not for quoting."""

import argparse
import json
import os
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from benchlib.memory import resident_less_guest  # noqa: E402

GUEST_MIB = 256
LIMIT = 180.0  # seconds, a boot
MARK = b"INNER init"
LINE = ("console=ttyS0 earlyprintk=serial,ttyS0,115200 reboot=k panic=-1 root=/dev/vda rw "
        "init=/sbin/bench-init")
INIT = "#!/bin/sh\necho INNER init\nsleep 1000\n"
QEMU = "qemu-system-x86_64"
QEMU_FILES = "/usr/share/qemu"
GOALS = (("first output, ms", None), ("init, ms", None), ("memory, MiB", 1 / 4))


def commands(folder, minivmm):
    def at(name):
        return os.path.join(folder, name)

    return {
        "minivmm": [minivmm, "boot", "--kernel", at("vmlinuz"), "--initrd", at("initrd.img"),
                    "--memory", f"{GUEST_MIB}M", "--disk", at("root.qcow2"), "--append", LINE],
        "qemu microvm": [
            QEMU, "-M", "microvm,accel=kvm", "-cpu", "host", "-m", str(GUEST_MIB), "-nodefaults",
            "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
            "-kernel", at("vmlinuz"), "-initrd", at("initrd.img"), "-append", LINE,
            "-global", "virtio-mmio.force-legacy=false",
            "-drive", f"if=none,id=d,file={at('root.qcow2')},format=qcow2",
            "-device", "virtio-blk-device,drive=d"],
    }


def boot(command):
    """{what: value} of one boot; the machine is killed when init has spoken."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    out = b""
    first = None
    try:
        while MARK not in out:
            left = began + LIMIT - time.monotonic()
            readable = left > 0 and select.select([process.stdout], [], [], left)[0]
            piece = os.read(process.stdout.fileno(), 65536) if readable else b""
            if not piece:
                raise RuntimeError(f"{command[0]}: no init: {out[-400:].decode(errors='replace')}")
            out += piece
            # A firmware may speak before the kernel.
            if first is None and b"Linux version" in out:
                first = time.monotonic()
        return {"first output, ms": ((first or time.monotonic()) - began) * 1e3,
                "init, ms": (time.monotonic() - began) * 1e3,
                "memory, MiB": resident_less_guest(process.pid, GUEST_MIB << 20) / (1 << 20)}
    finally:
        process.kill()
        process.wait()


def measure(folder, minivmm, rounds):
    machines = list(commands(folder, minivmm).items())
    results = {name: [] for name, _ in machines}
    for number in range(rounds):
        # Who begins changes.
        for name, command in machines[number % 2:] + machines[:number % 2]:
            results[name].append(boot(command))
            print("BENCH", json.dumps([name, results[name][-1]]), flush=True)


def report(lines):
    results = {}
    for line in lines:
        found = re.match(r"BENCH (\[.*)", line)
        if found:
            name, values = json.loads(found.group(1))
            for what, value in values.items():
                results.setdefault(what, {}).setdefault(name, []).append(value)
    if not results:
        raise RuntimeError("nothing was measured:\n" + "\n".join(lines[-40:]))
    for what, goal in GOALS:
        ours, peer = (sorted(results[what].get(n, [])) for n in ("minivmm", "qemu microvm"))
        if not ours or not peer:
            raise RuntimeError("a boot failed:\n" + "\n".join(lines[-40:]))
        ratio = statistics.median(ours) / statistics.median(peer)
        print(f"{what:18} minivmm {statistics.median(ours):9.1f} ({ours[0]:.1f} to {ours[-1]:.1f})   "
              f"qemu microvm {statistics.median(peer):9.1f} ({peer[0]:.1f} to {peer[-1]:.1f})   "
              f"ratio {ratio:.2f}" + (f", goal {goal:.2f}" if goal else ""))


def add_python(tree):
    tree.program(os.path.realpath(sys.executable), "/usr/bin/python3")
    library = os.path.dirname(os.__file__)
    unneeded = {"test", "idlelib", "ensurepip", "distutils", "lib2to3", "tkinter", "__pycache__",
                "dist-packages", "site-packages", "turtledemo", "pydoc_data"}
    for folder, folders, files in os.walk(library):
        folders[:] = [f for f in folders if f not in unneeded and not f.startswith("config-")]
        for name in files:
            tree.file(os.path.join(folder, name), os.path.join(folder, name))


def emulated(folder, minivmm, rounds):
    """The same in an emulated machine; lines of its console."""
    sys.path.insert(0, os.path.join(HERE, "..", "system", "linux"))
    from emulated_host import EmulatedHost, debian, linux
    packages = os.path.join(folder, "packages")
    stripped = os.path.join(folder, "minivmm.stripped")
    subprocess.run(["strip", "-o", stripped, minivmm], check=True)
    tree = linux.root(debian.busybox(packages))
    add_python(tree)
    tree.program(stripped, "work/minivmm")
    tree.program(shutil.which(QEMU), f"usr/bin/{QEMU}")
    for name in ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin"):
        path = os.path.join(QEMU_FILES, name)
        if os.path.exists(path):
            tree.file(path, os.path.realpath(path))
    tree.file("work/boot_run.py", os.path.abspath(__file__))
    for name in ("__init__.py", "memory.py"):
        tree.file(f"work/benchlib/{name}", os.path.join(HERE, "benchlib", name))
    for name in ("vmlinuz", "initrd.img", "root.raw", "root.qcow2"):
        tree.file(f"work/{name}", os.path.join(folder, name))
    tree.text("work/outer.sh", "cd /work && PATH=$PATH:/usr/bin exec python3 boot_run.py --here "
                               f"--minivmm ./minivmm --rounds {rounds} /work\n")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
        return EmulatedHost(work, packages, tree).run(60 + rounds * 2 * LIMIT)


def has_hardware(minivmm):
    done = subprocess.run([minivmm, "check-host"], stdout=subprocess.PIPE, check=False)
    return re.search(rb"(?m)^ok +kvm ", done.stdout) is not None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("folder", nargs="?", default="out/bench/linux",
                   help="where kernel and images are kept (default: %(default)s)")
    p.add_argument("--minivmm", default="build/release/cli/minivmm", metavar="PATH")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = p.parse_args()
    minivmm = os.path.abspath(arguments.minivmm)
    folder = os.path.abspath(arguments.folder)
    if arguments.here:
        measure(folder, minivmm, arguments.rounds)
        return
    if not shutil.which(QEMU):
        sys.exit(f"{QEMU} is not installed: there is nothing to compare with")
    os.makedirs(folder, exist_ok=True)
    init = os.path.join(folder, "bench-init")
    with open(init, "w", encoding="ascii") as f:
        f.write(INIT)
    os.chmod(init, 0o755)
    subprocess.run([os.path.join(HERE, "../../images/linux/build-images"), "--new", "--root-size",
                    "32M", "--add", f"{init}:sbin/bench-init", folder], check=True,
                   env={**os.environ, "MINIVMM": minivmm})
    if has_hardware(minivmm):
        done = subprocess.run([sys.executable, __file__, "--here", "--minivmm", minivmm, "--rounds",
                               str(arguments.rounds), folder], stdout=subprocess.PIPE, check=True)
        lines = done.stdout.decode().splitlines()
    else:
        lines = emulated(folder, minivmm, arguments.rounds)
    report(lines)


if __name__ == "__main__":
    main()
