#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures `minivmm image` beside qemu-img and cp on the same files, interleaved: convert, compare,
writing, check. Says which goals are met, those for peak memory as well.

Each round runs every program once on every case, and begins with another one. Sources are in the
page cache; targets are written to it (nobody flushes: qemu-img's default for convert is
cache=unsafe, cp does not either)."""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--minivmm", default="build/release/cli/minivmm", metavar="PATH")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the source disk")
    p.add_argument("--virtual", default="8T", metavar="SIZE", help="of the image that is checked")
    p.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    p.add_argument("--work", default="/var/tmp", metavar="DIR", help="where the images go")
    p.add_argument("--seconds", type=float, default=0, help="no further round after that long")
    p.add_argument("--out", metavar="FILE", help="results as JSON")
    return p.parse_args()


class Case:
    """`programs`: name -> command; `goals`: (our name, their names, least ratio of speed to the best
    of them)."""

    def __init__(self, name, programs, goals, made=()):
        self.name = name
        self.programs = programs
        self.goals = goals
        self.made = made  # what a run makes, and the next is to make anew
        self.times = {program: [] for program in programs}
        self.peaks = {program: 0 for program in programs}


def fill(path, size):
    """Half of it data that does not compress, an eighth stored zeroes, the rest holes."""
    rng = random.Random(1)
    piece = 1 << 20
    with open(path, "wb") as file:
        file.truncate(size)
        for at in range(0, size, piece):
            kind = rng.randrange(8)
            file.seek(at)
            if kind < 4:
                file.write(rng.randbytes(piece))
            elif kind == 4:
                file.write(bytes(piece))


def fill_compressible(path, size):
    """Programs and libraries of this machine, as the disk of a guest has them."""
    with open(path, "wb") as file:
        for folder in ("/usr/bin", "/usr/lib", "/usr/sbin"):
            for root, folders, names in os.walk(folder):
                folders.sort()
                for name in sorted(names):
                    found = os.path.join(root, name)
                    if not os.path.isfile(found) or os.path.islink(found):
                        continue
                    with open(found, "rb") as source:
                        file.write(source.read(size - file.tell()))
                    if file.tell() == size:
                        return


def touch_memory(work, size):
    """A virtual machine's host may have taken free memory back (balloon, free page reporting), and
    whoever gets it then waits several times as long for each page. So each program finds `size`
    bytes that were used a moment ago."""
    path = os.path.join(work, "touched")
    piece = bytes(1 << 20)
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            file.write(piece)
    os.unlink(path)


def run(command, work):
    """Seconds."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.decode(errors='replace')}")
    return seconds


def peak_memory(command, work):
    """KiB; 0 where GNU time is not installed. Not what wait4 tells: a process inherits the peak of
    the one that it was forked from, which is this one."""
    if shutil.which("time") is None:
        return 0
    told = os.path.join(work, "peak")
    run(["time", "-f", "%M", "-o", told, *command], work)
    with open(told, encoding="ascii") as file:
        return int(file.read())


def cases(ours, work, arguments):
    fill(os.path.join(work, "raw"), arguments.size << 20)
    for command in (["qemu-img", "convert", "-O", "qcow2", "raw", "qcow2"],
                    ["qemu-img", "create", "-q", "-f", "raw", "empty", "100G"]):
        run(command, work)
    image = [ours, "image"]
    best = {"qemu-img": [], "qemu-img -W": ["-W"], "qemu-img -W -m 16": ["-W", "-m", "16"]}

    def convert(name, target, words, goals, copy=False):
        programs = {"minivmm": image + ["convert", "-O", target, *words, "out"]}
        for label, more in best.items():
            programs[label] = ["qemu-img", "convert", *more, "-O", target, *words, "out"]
        if copy:
            programs["cp --sparse"] = ["cp", "--sparse=always", words[-1], "out"]
        return Case(name, programs, goals, ("out",))
    qemu = ("minivmm", tuple(best), 1.0)
    yield convert("convert raw to raw", "raw", ["-f", "raw", "raw"],
                  [qemu, ("minivmm", ("cp --sparse",), 0.9)], True)
    yield convert("convert raw to qcow2", "qcow2", ["-f", "raw", "raw"],
                  [qemu, ("minivmm", ("cp --sparse",), 0.9)], True)
    yield convert("convert qcow2 to raw", "raw", ["-f", "qcow2", "qcow2"],
                  [qemu, ("minivmm", ("cp --sparse",), 0.9)], True)
    fill_compressible(os.path.join(work, "text"), arguments.size << 18)
    for kind in ("zlib", "zstd"):
        yield convert(f"convert raw to compressed {kind}", "qcow2",
                      ["-c", "-o", f"compression_type={kind}", "-f", "raw", "text"],
                      [("minivmm", tuple(best), 1.5)])
    yield convert("convert 100 GiB of nothing", "qcow2", ["-f", "raw", "empty"], [qemu])
    words = ["compare", "-f", "raw", "-F", "qcow2", "raw", "qcow2"]
    yield Case("compare raw with qcow2", {"minivmm": image + words, "qemu-img": ["qemu-img", *words]},
               [("minivmm", ("qemu-img",), 1.0)])
    # The time to flush what was written is part of it, as for a guest that shuts down.
    count = (arguments.size << 20) // 65536
    for name, backing, depth in ((name, backing, depth) for depth in (1, 32) for name, backing in
                                 (("allocating writes", ""),
                                  ("copying on write", "-b raw -F raw"))):
        words = f"-f qcow2 -w -c {count} -d {depth} -s 4k -S 64k out"
        make = f"qemu-img create -q -f qcow2 {backing} out {arguments.size}M"
        yield Case(f"{name}, depth {depth}",
                   {"minivmm": ["sh", "-c", f"{make} && {ours} image bench {words}"],
                    "qemu-img": ["sh", "-c", f"{make} && qemu-img bench {words}"]},
                   [("minivmm", ("qemu-img",), 1.5)], ("out",))
    if arguments.only in "check":
        run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "large",
             arguments.virtual], work)
    words = ["check", "-f", "qcow2", "large"]
    yield Case(f"check of {arguments.virtual}",
               {"minivmm": image + words, "qemu-img": ["qemu-img", *words]},
               [("minivmm", ("qemu-img",), 2.0)])


def remove(case, work):
    for made in case.made:
        if os.path.exists(os.path.join(work, made)):
            os.unlink(os.path.join(work, made))


def measure(plan, work, arguments):
    for case in plan:
        for name, command in case.programs.items():
            remove(case, work)
            case.peaks[name] = peak_memory(command, work)
    end = time.monotonic() + arguments.seconds if arguments.seconds else float("inf")
    for number in range(arguments.rounds):
        if time.monotonic() > end:
            break
        for case in plan:
            names = list(case.programs)
            for name in names[number % len(names):] + names[:number % len(names)]:
                remove(case, work)
                if case.made:
                    touch_memory(work, arguments.size << 20)
                case.times[name].append(run(case.programs[name], work))
        print(f"round {number + 1} of {arguments.rounds}, load {os.getloadavg()[0]:.1f}",
              file=sys.stderr)


def report(plan):
    out = {}
    for case in plan:
        medians = {name: statistics.median(times) for name, times in case.times.items()}
        print(f"\n{case.name}")
        for name, seconds in medians.items():
            print(f"  {name:20} {seconds:8.3f} s   from {min(case.times[name]):.3f} to "
                  f"{max(case.times[name]):.3f}   {case.peaks[name] / 1024:6.0f} MiB")
        out[case.name] = {"times": case.times, "peak-kib": case.peaks}
        for ours, theirs, least in case.goals:
            other = min(theirs, key=lambda name: medians[name])
            ratio = medians[other] / medians[ours]
            verdict = "pass" if ratio >= least else "MISS"
            print(f"  {verdict}: {ratio:.2f} of the speed of {other} (goal: {least})")
        if not all(case.peaks.values()):
            print("  peak memory: not measured (GNU time is not installed)")
            continue
        # Whatever is fastest may also take the most memory: the least of theirs is the goal.
        other = min((name for name in case.peaks if name.startswith("qemu")), key=case.peaks.get)
        verdict = "pass" if case.peaks["minivmm"] <= case.peaks[other] else "MISS"
        print(f"  {verdict}: peak memory {case.peaks['minivmm'] / case.peaks[other]:.2f} of {other} "
              "(goal: 1.0 at most)")
    return out


def main():
    arguments = parse_arguments()
    ours = os.path.abspath(arguments.minivmm)
    work = os.path.join(arguments.work, f"minivmm-image-bench-{os.getpid()}")
    os.mkdir(work)
    try:
        plan = [c for c in cases(ours, work, arguments) if arguments.only in c.name]
        measure(plan, work, arguments)
        results = report(plan)
    finally:
        shutil.rmtree(work)
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
