"""Rented machines: every half minute a node is killed or another one comes, and replicas train on.

    python -m benchmarks.churn [--quick] [--json] [--sync diloco] [--dynamic] [--minutes 10]

Four to six nodes with one worker each train a byte-level GPT in rounds of ten local steps, with six replicas. Every 30 s the
dice say whether a node is lost (its agent and worker by SIGKILL) or another one starts. With --dynamic rounds are dealt by
speed, and nobody computes again what a lost node had. There are

    goodput     the part of the time that went into rounds that were kept, start-up and all: what the controller says
    hangs       times that nothing was committed for 20 s
    apart       rounds after which two workers did not hold the same agreed parameters, bit by bit
    spread      with noloco the largest root mean square distance of replicas from their mean, and the median
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.logs import read_lines
from benchmarks.report import Reporter, command, main_of
from examples.cluster import Cluster, ClusterError

NODES_MIN, NODES_BEGIN, NODES_MAX = 4, 5, 6
PERIOD_S, HANG_S = 30.0, 20.0
SPREAD_MAX = 0.05
"""Root mean square over all parameters, of which each is about 0.05 itself: farther apart they would have nothing in common."""
GOODPUT_MIN = 0.95
START_S, END_S, POLL_S = 120.0, 120.0, 0.25


class Crowd:
    """Nodes that come and go, and whether the job goes on meanwhile."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._dice = random.Random(seed)
        self._here: list[str] = []
        self._number = 0
        self.lost = self.came = self.hangs = 0
        self._step, self._seen_s = 0, time.monotonic()
        self._hangs_now = False

    def start(self) -> None:
        """Start one more node."""
        self._here.append(f"n{self._number}")
        self._number += 1
        self._cluster.start_agent(self._here[-1])

    def change(self) -> str:
        """Kill a node or start one; returns which, in words."""
        may_lose, may_come = len(self._here) > NODES_MIN, len(self._here) < NODES_MAX
        if may_lose and (not may_come or self._dice.random() < 0.5):
            node = self._here.pop(self._dice.randrange(len(self._here)))
            self._cluster.kill_node(node)
            self.lost += 1
            return f"{node} is killed"
        self.start()
        self.came += 1
        return f"{self._here[-1]} starts"

    def watch(self) -> None:
        """Look whether something was committed. Raises ClusterError if the job is over."""
        step, now_s = self._cluster.status().step, time.monotonic()
        if step > self._step:
            self._step, self._seen_s, self._hangs_now = step, now_s, False
        elif now_s - self._seen_s > HANG_S and not self._hangs_now:
            self.hangs, self._hangs_now = self.hangs + 1, True


def run(
    folder: Path, sync: str, minutes: float, reporter: Reporter, *, dynamic: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Train for so long; returns what came of it. Raises ClusterError if the job fails."""
    folder.mkdir()
    go = folder / "go"
    script = ["-m", "benchmarks.train_sync", "--sync", sync, "--slots", str(NODES_MAX), "--until", str(go)]
    script += ["--log", str(folder / "steps"), *(["--dynamic"] if dynamic else [])]
    options = ("--join-timeout", "3", "--max-restarts", "1000")
    with Cluster(folder, script, nodes_min=NODES_BEGIN - 1, nodes_max=NODES_MAX, controller_options=options) as cluster:
        cluster.start_controller()
        crowd = Crowd(cluster, seed)
        for _ in range(NODES_BEGIN):
            crowd.start()
        cluster.wait_for_world(NODES_BEGIN, START_S)
        began_s = time.monotonic()
        changes = 0
        while (passed_s := time.monotonic() - began_s) < 60 * minutes:
            if passed_s >= (changes + 1) * PERIOD_S:
                changes += 1
                reporter.say(f"{sync}: {crowd.change()} at step {cluster.status().step}")
            crowd.watch()
            time.sleep(POLL_S)
        go.touch()
        if cluster.wait_for_end(END_S) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
        summary = cluster.summary()
    return {
        "minutes": minutes,
        "killed": crowd.lost,
        "joined": crowd.came,
        "goodput": summary["goodput"],
        "lost_s": sum(incident["seconds_lost"] for incident in summary["incidents"]),
        "hangs": crowd.hangs,
        "rounds": summary["step"],
        "incidents": len(summary["incidents"]),
        **_together(read_lines(folder / "steps")),
    }


def _together(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each step, whether all who went on from it hold the same; and how far replicas are from their mean."""
    digests: dict[tuple[int, int], set[int]] = {}
    for line in lines:
        if "digest" in line:
            digests.setdefault((line["step"], line["generation"]), set()).add(line["digest"])
    spreads = [line["spread"] for line in lines if not math.isnan(line.get("spread", math.nan))]
    return {
        "compared": len(digests),
        "apart": sum(len(each) > 1 for each in digests.values()),
        "spread_max": max(spreads, default=0.0),
        "spread_median": statistics.median(spreads) if spreads else 0.0,
    }


def is_sound(found: dict[str, Any]) -> bool:
    """Return whether nothing hung and nobody went astray."""
    return not found["hangs"] and not found["apart"] and found["spread_max"] < SPREAD_MAX


def told(found: dict[str, Any]) -> str:
    """Return it in words."""
    return (
        f"goodput {found['goodput']:.1%} with {found['killed']} nodes killed and {found['joined']} come in {found['minutes']:g} "
        f"minutes, {found['hangs']} hangs, {found['apart']} of {found['compared']} rounds apart, spread at most "
        f"{found['spread_max']:.2e}"
    )


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run it; returns the report."""
    minutes = arguments.minutes or (1.5 if arguments.quick else 10.0)
    found = run(folder / arguments.sync, arguments.sync, minutes, reporter, dynamic=arguments.dynamic)
    return found, is_sound(found) and (arguments.quick or found["goodput"] >= GOODPUT_MIN)


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("", "")
    for name, value in report.items():
        if not isinstance(value, dict):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--sync", choices=["diloco", "streaming_diloco", "noloco", "async"], default="noloco", help="[noloco]")
    parser.add_argument("--dynamic", action="store_true", help="deal rounds by speed")
    parser.add_argument("--minutes", type=float, default=0.0, help="[10; with --quick 1.5]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
