"""How much shorter a step is if every slot passes a share of the stages by, beside what the simulator predicts.

    python -m benchmarks.skipping [--quick] [--json] [--rounds N] [--ratio R]

Six workers of one node train 24 blocks that take 2 ms forward and 4 ms backward for each of 12 slots, without a processor (see
`benchmarks.train_waits`), in turns straight and with --skip-ratio 0.33: two of six stages are passed by. Of each round:

    straight_s, skipping_s   the median steps
    shorter                  by which share a step is shorter
    predicted                by which share it should be: of the steps as the plans of both jobs predict them
    ratio                    the steps' ratio over the predicted one: 1 if the simulator is right

Medians over rounds with their order-statistic intervals. `work` is the share of the blocks that slots pass by: no step can be
shorter than by that where all workers are busy all the time.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of
from benchmarks.reshard import SCRIPT, STEADY_STEPS, median_step_s, read_commits
from examples.cluster import Cluster

WORKERS, SLOTS, BLOCKS = 6, 12, 24
STEPS = 40
START_S, RUN_S = 120.0, 120.0
TIMES = ("straight_s", "skipping_s", "shorter", "predicted", "ratio")


def step_of(folder: Path, options: tuple[str, ...], steps: int) -> tuple[float, float, float]:
    """Return a job's median step, what its plan predicts, and the share of the blocks that slots pass by."""
    folder.mkdir()
    script = [
        *(*SCRIPT, "--blocks", str(BLOCKS), "--slots", str(SLOTS), "--forward-ms", "2", "--backward-ms", "4"),
        *("--width", "64", "--log", str(folder / "steps"), "--steps", str(steps)),
    ]
    with Cluster(folder, script, controller_options=("--snapshot-every", "0", *options)) as cluster:
        cluster.start_controller()
        cluster.start_agent("node", WORKERS)
        cluster.wait_for_world(WORKERS, START_S)
        plan = cluster.plan()
        cluster.wait_for_end(RUN_S)
    commits = read_commits(folder / "steps")[STEADY_STEPS:]
    count = plan.stages[-1].last
    passed = sum(len(path) for path in plan.all_paths()) / plan.slots if plan.path_of else count
    return median_step_s(commits), plan.predicted_s, (count - passed) / BLOCKS


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run both jobs in turns; returns the report."""
    rounds: list[dict[str, float]] = []
    work = 0.0
    for number in range(arguments.rounds or (1 if arguments.quick else 5)):
        straight_s, straight_predicted_s, _ = step_of(folder / f"straight{number}", (), STEPS)
        options = ("--skip-ratio", str(arguments.ratio))
        skipping_s, skipping_predicted_s, work = step_of(folder / f"skipping{number}", options, STEPS)
        actual, expected = skipping_s / straight_s, skipping_predicted_s / straight_predicted_s
        rounds.append(dict(zip(TIMES, (straight_s, skipping_s, 1 - actual, 1 - expected, actual / expected), strict=True)))
        reporter.say(f"{straight_s:.3f} s, skipping {skipping_s:.3f} s: {1 - actual:.3f} less, {1 - expected:.3f} expected")
    report: dict[str, Any] = {"rounds": len(rounds), "skip_ratio": arguments.ratio, "work": round(work, 4)}
    for name in TIMES:
        values = [each[name] for each in rounds]
        low, high = median_interval(values)
        report[name], report[f"{name}_ci"] = round(statistics.median(values), 4), [round(low, 4), round(high, 4)]
    return report, True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"{report['work']:.0%} of the blocks are passed by, {report['rounds']} round(s)"
    table = Table("", "median", "interval", title=title)
    for name in TIMES:
        low, high = report[f"{name}_ci"]
        table.add_row(name, f"{report[name]:.4f}", f"{low:.4f} .. {high:.4f}")
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="[5; with --quick 1]")
    parser.add_argument("--ratio", type=float, default=0.33, help="of the stages that a slot passes by [0.33]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
