# SPDX-License-Identifier: Apache-2.0
"""Medians, spread, ratios with their goals, as a table and as JSON."""

import dataclasses
import re
import statistics

from .cases import GOALS, LIMITS


@dataclasses.dataclass
class Summary:
    """One entry on one case."""
    median: float
    low: float       # first and third quartile
    high: float
    rounds: int
    p50_us: float = 0.0
    server_us: float = 0.0  # server CPU a request
    unit: str = "iops"
    peak_mib: float = 0.0   # the server's memory at its most, without files' pages
    files_mib: float = 0.0  # these


def _median_of(results, key):
    values = [key(r) for r in results]
    values = [v for v in values if v]
    return statistics.median(values) if values else 0.0


def _server_us(result):
    if not result.get("requests") or "server_cpu_seconds" not in result:
        return 0.0
    # The server also worked through the ramp, which "requests" leaves out.
    whole = result["seconds"] + result.get("ramp", 0)
    requests = result["requests"] * whole / result["seconds"]
    return result["server_cpu_seconds"] / requests * 1e6


def summarise(results):
    """Of one entry's results on one case, a dict a round."""
    values = sorted(r["value"] if "value" in r else r["iops"] for r in results)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4)
    else:
        low, high = values[0], values[-1]
    return Summary(statistics.median(values), low, high, len(values),
                   _median_of(results, lambda r: r.get("latency_us", {}).get("p50")),
                   _median_of(results, _server_us), results[0].get("unit", "iops"),
                   _median_of(results, lambda r: r.get("server_peak_mib")),
                   _median_of(results, lambda r: r.get("server_files_mib")))


@dataclasses.dataclass
class Verdict:
    case: str
    text: str
    value: float
    goal: float
    passed: bool


def _compare(goal, case, row):
    def value(summary):
        return summary.server_us if goal.cpu else summary.median
    peers = {n: value(s) for n, s in row.items() if re.search(goal.peers, n) and value(s)}
    if not peers or not value(row[goal.ours]):
        return None
    less = goal.cpu or goal.less
    best = (min if less else max)(peers, key=peers.get)
    ratio = value(row[goal.ours]) / peers[best]
    passed = ratio <= goal.ratio if less else ratio >= goal.ratio
    text = f"{goal.ours} / {best}{', CPU' if goal.cpu else ''}{', at most' if less else ''}"
    return Verdict(case, text, ratio, goal.ratio, passed)


def judge(table):
    """`table` is {case: {entry: Summary}}. A goal whose parts were not measured is left out."""
    verdicts = []
    for goal in GOALS:
        for case, row in table.items():
            if not re.search(goal.case, case) or goal.ours not in row:
                continue
            verdict = _compare(goal, case, row)
            if verdict:
                verdicts.append(verdict)
    for case, entry, most, unit in LIMITS:
        if entry in table.get(case, {}):
            value = table[case][entry].median
            verdicts.append(Verdict(case, f"{entry}, at most {most:g} {unit}", value, most,
                                    value <= most))
    return verdicts


def print_table(table):
    for case, row in table.items():
        unit = next(iter(row.values())).unit
        print(f"\n{case}  ({unit}; median, quartiles)")
        for entry, s in row.items():
            digits = 0 if s.median >= 1000 else 1
            extra = f"  p50 {s.p50_us:8.1f} us" if s.p50_us else ""
            if s.server_us:
                extra += f"  server {s.server_us:6.2f} us CPU a request"
            if s.peak_mib:
                extra += f", {s.peak_mib:.0f} MiB and {s.files_mib:.0f} MiB of files"
            print(f"  {entry:24} {s.median:12,.{digits}f}  [{s.low:,.{digits}f} .. "
                  f"{s.high:,.{digits}f}]{extra}")


def print_verdicts(verdicts):
    if not verdicts:
        print("\nNo goal could be judged: its parts were not measured.")
        return
    print("\nGoals")
    for v in verdicts:
        mark = "pass" if v.passed else "MISS"
        print(f"  {mark}  {v.case:24} {v.text:42} {v.value:7.2f}  goal {v.goal:.3g}")


def as_json(table, verdicts, facts, raw):
    return {
        "facts": facts,
        "cases": {c: {e: dataclasses.asdict(s) for e, s in row.items()}
                  for c, row in table.items()},
        "goals": [dataclasses.asdict(v) for v in verdicts],
        "rounds": raw,
    }
