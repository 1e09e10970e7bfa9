#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures minivmm against its peers and against the physical limits, interleaved, on the same
images and machine, and says which goals are met. See README.md in this folder.

Needs Python 3.9 and the tools built from this folder; every peer is optional."""

import argparse
import json
import os
import platform
import re
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from benchlib import cases, images, loads, plot, processes, report  # noqa: E402


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--build", default="build/release", metavar="DIR",
                   help="build folder (default: %(default)s)")
    p.add_argument("--minivmm", metavar="PATH", help="default: BUILD/cli/minivmm")
    p.add_argument("--probe", metavar="PATH", help="default: BUILD/images/probe/minivmm-probe.elf")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--seconds", type=float, default=0.6, help="a point (default: %(default)s)")
    p.add_argument("--ramp", type=float, default=0.15, help="load before each measurement")
    p.add_argument("--only", default="", metavar="PATTERN", help="cases that match")
    p.add_argument("--without", default="^$", metavar="PATTERN", help="no servers that match")
    p.add_argument("--size", type=int, default=1024, metavar="MIB", help="image size")
    p.add_argument("--work", default="/var/tmp", metavar="DIR", help="where the images go")
    p.add_argument("--out", default="out/bench", metavar="DIR", help="where the results go")
    p.add_argument("--list", action="store_true", help="lists cases and servers, measures nothing")
    return p.parse_args()


def selected(groups, arguments):
    """[(case, [entries that are there])], and what is absent, by name."""
    absent = {}
    plan = []
    for group in groups:
        there = []
        for entry in group.entries:
            if re.search(arguments.without, entry.label):
                continue
            why = entry.server.missing()
            if why:
                absent[entry.label] = why
            else:
                there.append(entry)
        for case in group.cases:
            taking = [e for e in there if e.takes_part(case)]
            if taking and re.search(arguments.only, case.name):
                plan.append((case, taking))
    return plan, absent


def measure(tools, workplace, made, case, entry, arguments, seed):
    image = made.get(entry.image or case.image)
    running = entry.server.start(workplace, image, entry.image_format)
    try:
        result = entry.load(tools, case, running, arguments.seconds, arguments.ramp, seed)
    finally:
        running.stop()
    if result.get("errors"):
        raise processes.Failed(f"{result['errors']} requests failed")
    result.setdefault("ramp", arguments.ramp)
    return result


class Run:
    """All rounds. An entry that fails on a case is named once and left out of it from then on."""

    def __init__(self, tools, workplace, arguments, plan):
        self.tools = tools
        self.workplace = workplace
        self.arguments = arguments
        self.plan = plan
        self.made = images.Images(workplace, arguments.size << 20)
        self.raw = {case.name: {e.label: [] for e in entries} for case, entries in plan}
        self.failed = {}

    def prepare(self):
        for name in {e.image or case.image for case, entries in self.plan for e in entries}:
            try:
                self.made.get(name)
                self.made.warm(name)
            except processes.Failed as e:
                print(f"image {name}: {e}", file=sys.stderr)
                self.failed.update({(c.name, x.label): str(e) for c, es in self.plan for x in es
                                    if (x.image or c.image) == name})

    def one(self, case, entry, seed):
        key = (case.name, entry.label)
        if key in self.failed:
            return
        try:
            result = measure(self.tools, self.workplace, self.made, case, entry, self.arguments,
                             seed)
            self.raw[case.name][entry.label].append(result)
        except processes.Failed as e:
            self.failed[key] = str(e)
            print(f"\n{case.name}: {entry.label} failed: {e}", file=sys.stderr)

    def all_rounds(self):
        """Each case on each server in turn; who begins changes with every round."""
        for number in range(self.arguments.rounds):
            began = time.monotonic()
            for place, (case, entries) in enumerate(self.plan):
                shift = (number + place) % len(entries)
                for entry in entries[shift:] + entries[:shift]:
                    self.one(case, entry, seed=number + 1)
            print(f"round {number + 1} of {self.arguments.rounds}: "
                  f"{time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.1f}",
                  file=sys.stderr, flush=True)

    def table(self):
        rows = {}
        for case, by_entry in self.raw.items():
            row = {e: report.summarise(r) for e, r in by_entry.items() if r}
            if row:
                rows[case] = row
        return rows


def machine_facts(arguments):
    cpu = "unknown CPU"
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    return {"cpu": cpu, "cpus": os.cpu_count(), "kernel": platform.release(),
            "image_mib": arguments.size, "rounds": arguments.rounds,
            "seconds": arguments.seconds, "page_cache": "image cached, 4k cases in small folios",
            "when": time.strftime("%Y-%m-%d %H:%M:%S"), "load_at_start": os.getloadavg()[0]}


def write_results(directory, table, verdicts, facts, run):
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "results.json"), "w", encoding="utf-8") as f:
        json.dump(report.as_json(table, verdicts, facts, run.raw), f, indent=1)
    title = (f"minivmm and peers: {facts['cpu']}, {facts['cpus']} CPUs, Linux {facts['kernel']}, "
             f"{facts['rounds']} rounds of {facts['seconds']:g} s")
    with open(os.path.join(directory, "results.svg"), "w", encoding="utf-8") as f:
        f.write(plot.draw(table, title))
    print(f"\nWritten: {directory}/results.json, {directory}/results.svg")


def main():
    arguments = parse_arguments()
    build = arguments.build
    tools = loads.Tools(f"{build}/tests/bench", arguments.minivmm or f"{build}/cli/minivmm",
                        arguments.probe or f"{build}/images/probe/minivmm-probe.elf")
    plan, absent = selected(cases.groups(tools), arguments)
    for name, why in absent.items():
        print(f"not measured: {name}: {why}", file=sys.stderr)
    if arguments.list or not plan:
        for case, entries in plan:
            print(f"{case.name:28} {', '.join(e.label for e in entries)}")
        return 0 if plan else 2
    processes.exit_on_signals()
    workplace = processes.Workplace(arguments.work)
    try:
        run = Run(tools, workplace, arguments, plan)
        facts = machine_facts(arguments)
        run.prepare()
        run.all_rounds()
        table = run.table()
        if not table:
            return 1
        verdicts = report.judge(table)
        report.print_table(table)
        report.print_verdicts(verdicts)
        facts["not_measured"] = absent
        facts["failed"] = {f"{c}: {e}": why for (c, e), why in run.failed.items()}
        write_results(arguments.out, table, verdicts, facts, run)
        return 0 if not run.failed else 1
    finally:
        workplace.close()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
