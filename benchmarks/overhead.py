"""What a step costs more than under plain DistributedDataParallel, with nothing failing.

    python -m benchmarks.overhead [--quick] [--json] [--workers N]

Three jobs on one node: the fast and the ordered reduction, whose workers read each other's memory as they do by
default, and the ordered one once more between workers that send, as those of different nodes do. In each, the
same processes train two copies of the 5-million-parameter GPT in turns, one through elastic (the prepared loader
and optimizer, an agent and a controller beside it, as always) and one under DDP over gloo, with AdamW, zero_grad
and gradient averaging on both sides: blocks of steps in random order, a DDP block again as the control.
`benchmarks.train_pairs` is that script.

A block's value is the median of its steps, averaged over the workers; a round's ratio is that of its elastic
block (or its control block) to its DDP block. Reported are the median ratio over all rounds and its 95 %
interval from order statistics (distribution-free), so that the drift of a busy machine cancels and what is
left of it is visible in `ddp_over_ddp`, whose true value is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.paired import ratio
from benchmarks.report import Reporter, command, main_of
from examples.cluster import Cluster, ClusterError

SIDES = {
    "fast": ("fast", ()),
    "ordered": ("ordered", ()),
    "ordered_sending": ("ordered", ("--no-share-memory",)),
}
"""What is compared with DDP: the reduction, and options of the agent."""
START_S = 180.0
STEP_S_MAX = 3.0


def read_rounds(folder: Path, workers: int) -> list[dict[str, float]]:
    """Return each round's block values in seconds, averaged over the workers."""
    by_round: dict[int, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            values = json.loads(line)
            by_round.setdefault(values["round"], []).append(values)
    return [
        {name: statistics.mean(statistics.median(one[name]) for one in lines)
         for name in ("elastic_s", "ddp_s", "control_s")}
        for _, lines in sorted(by_round.items())
        if len(lines) == workers
    ]  # fmt: skip


def run_job(
    side: str, folder: Path, arguments: argparse.Namespace, rounds: int, reporter: Reporter
) -> list[dict[str, float]]:
    """Run one job; returns its rounds."""
    reduction, options = SIDES[side]
    folder.mkdir()
    out = folder / "pairs"
    out.mkdir()
    script = ["-m", "benchmarks.train_pairs", "--reduction", reduction, "--out", str(out)]
    script += ["--rounds", str(rounds), "--block", str(arguments.block), "--batch", str(arguments.batch)]
    reporter.say(
        f"{side}: {rounds} rounds of 3 blocks of {arguments.block} steps, {arguments.workers} workers"
    )
    with Cluster(folder, script, agent_options=options) as cluster:
        cluster.start_controller()
        cluster.start_agent("node", arguments.workers)
        if cluster.wait_for_end(START_S + STEP_S_MAX * 3 * rounds * arguments.block) != 0:
            raise ClusterError(f"the job of {side} failed{cluster.last_words()}")
        if cluster.summary()["incidents_total"]:
            raise ClusterError("a worker was lost while measuring: nothing is reported")
    return read_rounds(out, arguments.workers)


def over_ddp(rounds: list[dict[str, float]], name: str) -> tuple[float, list[float]]:
    """Return the median of the paired ratios to DDP, and its interval."""
    return ratio([one[name] for one in rounds], [one["ddp_s"] for one in rounds])


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run both jobs; returns the report."""
    rounds = arguments.rounds or (6 if arguments.quick else 30)
    arguments.block = arguments.block or (6 if arguments.quick else 10)
    report: dict[str, Any] = {"workers": arguments.workers, "rounds": rounds, "block_steps": arguments.block}
    everything: list[dict[str, float]] = []
    for side in SIDES:
        found = run_job(side, folder / side, arguments, rounds, reporter)
        everything += found
        name = f"{side}_over_ddp"
        report[name], report[f"{name}_ci"] = over_ddp(found, "elastic_s")
        report[f"{side}_ms"] = round(1e3 * statistics.median(one["elastic_s"] for one in found), 2)
        report[f"{side}_ddp_ms"] = round(1e3 * statistics.median(one["ddp_s"] for one in found), 2)
        extra = statistics.median(one["elastic_s"] - one["ddp_s"] for one in found)
        report[f"{side}_extra_ms"] = round(1e3 * extra, 2)
    report["ddp_over_ddp"], report["ddp_over_ddp_ci"] = over_ddp(everything, "control_s")
    return report, True


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"a step over plain DDP, {report['workers']} workers, {report['rounds']} rounds"
    table = Table("", "ratio", "95 %", "ms", "DDP ms", title=title)
    for name in SIDES:
        low, high = report[f"{name}_over_ddp_ci"]
        values = (report[f"{name}_over_ddp"], report[f"{name}_ms"], report[f"{name}_ddp_ms"])
        table.add_row(
            name, f"{values[0]:.3f}", f"{low:.3f} .. {high:.3f}", f"{values[1]:.1f}", f"{values[2]:.1f}"
        )
    low, high = report["ddp_over_ddp_ci"]
    table.add_row("DDP (control)", f"{report['ddp_over_ddp']:.3f}", f"{low:.3f} .. {high:.3f}", "", "")
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="[30; with --quick 6]")
    parser.add_argument("--block", type=int, default=0, help="steps in a block [10; with --quick 6]")
    parser.add_argument("--batch", type=int, default=2, help="windows per worker and step")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
