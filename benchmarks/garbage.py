"""What planned garbage collection (`--gc-every`) saves, with many Python objects alive and garbage in every step.

    python -m benchmarks.garbage [--quick] [--json] [--workers N]

Jobs that differ in --gc-every only, in turns; 0 leaves the collector to Python. Reported are the mean, median and 99th
percentile of what a step takes the first worker, over all rounds without their first 20 steps, and the memory at the end.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.report import Reporter, command, main_of
from examples.cluster import Cluster, ClusterError

SETTINGS = (0, 1, 10, 100)
WARM_STEPS = 20
END_S = 240.0


def run_job(every: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one job; returns what its first worker has written."""
    folder.mkdir()
    script = ["-m", "benchmarks.train_garbage", "--out", str(folder / "out"), "--steps", str(arguments.steps)]
    script += ["--objects", str(arguments.objects), "--garbage", str(arguments.garbage)]
    with Cluster(folder, script, agent_options=("--gc-every", str(every))) as cluster:
        cluster.start_controller()
        cluster.start_agent("node", arguments.workers)
        if cluster.wait_for_end(END_S) != 0:
            raise ClusterError(f"the job with --gc-every {every} failed{cluster.last_words()}")
        if cluster.summary()["incidents_total"]:
            raise ClusterError("a worker was lost while measuring: nothing is reported")
    found: dict[str, Any] = json.loads((folder / "out" / "0.json").read_text())
    return found


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run all jobs; returns the report."""
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    found: dict[int, list[dict[str, Any]]] = {every: [] for every in SETTINGS}
    for number in range(rounds):
        for every in SETTINGS:
            reporter.say(f"round {number + 1} of {rounds}: --gc-every {every}")
            found[every].append(run_job(every, folder / f"{number}-{every}", arguments))
    report: dict[str, Any] = {"workers": arguments.workers, "rounds": rounds, "steps": arguments.steps}
    for every, jobs in found.items():
        steps_ms = [1e3 * value for job in jobs for value in job["steps_s"][WARM_STEPS:]]
        report[f"gc_{every}"] = {
            "mean_ms": round(statistics.mean(steps_ms), 3),
            "median_ms": round(statistics.median(steps_ms), 3),
            "p99_ms": round(statistics.quantiles(steps_ms, n=100)[98], 3),
            "max_ms": round(max(steps_ms), 3),
            "means_ms": [round(1e3 * statistics.mean(job["steps_s"][WARM_STEPS:]), 3) for job in jobs],
            "resident_mib": round(max(job["resident_pages"] for job in jobs) * mmap.PAGESIZE / 2**20),
        }
    return report, True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"a step of {report['workers']} workers, {report['rounds']} rounds of {report['steps']} steps"
    table = Table("--gc-every", "mean ms", "median ms", "99 % ms", "longest ms", "resident MiB", title=title)
    for every in SETTINGS:
        row = report[f"gc_{every}"]
        table.add_row(str(every), *(str(row[k]) for k in ("mean_ms", "median_ms", "p99_ms", "max_ms", "resident_mib")))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="[5; with --quick 1]")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--objects", type=int, default=1_000_000, help="alive from before the first step on")
    parser.add_argument("--garbage", type=int, default=200, help="cycles that each step leaves")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
