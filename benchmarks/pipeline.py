"""What a step of a pipeline costs beside torch.distributed.pipelining's, with nothing failing.

    python -m benchmarks.pipeline [--quick] [--json]

One job on one node: two workers, a stage each, with an agent and a controller beside them as always. The same two processes
train two copies of a GPT in turns, one through elastic's executor and one through torch's Schedule1F1B over gloo: the same
weights, cuts and micro-batches, with AdamW, zero_grad and the loss's value on both sides; blocks of steps in random order, a
torch block again as the control. The losses of the first step are compared, too. `benchmarks.train_stages` is that script.

A block's value is the median of its steps, averaged over the workers; a round's ratio is that of its elastic block (or its
control block) to its torch block. Reported are the median ratio over all rounds and its 95 % interval from order statistics
(distribution-free), so that the drift of a busy machine cancels and what is left of it is visible in `torch_over_torch`,
whose true value is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.overhead import START_S, STEP_S_MAX
from benchmarks.paired import ratio
from benchmarks.report import Reporter, command, main_of
from examples.cluster import Cluster, ClusterError

STAGES = 2
LOSS_TOLERANCE = 1e-5
"""Relative: the same sums in another order."""
SIDES = ("elastic_s", "torch_s", "control_s")


def read_rounds(folder: Path) -> tuple[list[dict[str, float]], list[int]]:
    """Return each round's block values in seconds, averaged over the workers; and the cuts: the first layers of stage 1."""
    first, last = (
        [json.loads(line) for line in (folder / f"stage{stage}.jsonl").read_text().splitlines()]
        for stage in range(STAGES)
    )
    rounds = [
        {name: statistics.mean(statistics.median(one[name]) for one in lines) for name in SIDES}
        for lines in zip(first, last, strict=True)
    ]
    return rounds, sorted({line["layers"][0] for line in last})


def run_job(arguments: argparse.Namespace, folder: Path, rounds: int) -> None:
    """Run the job, whose workers write what they find into a folder."""
    script = ["-m", "benchmarks.train_stages", "--out", str(folder), "--rounds", str(rounds)]
    for name in ("dim", "layers", "batch", "slots", "block"):
        script += [f"--{name}", str(getattr(arguments, name))]
    with Cluster(folder, script) as cluster:
        cluster.start_controller()
        cluster.start_agent("node", STAGES)
        if cluster.wait_for_end(START_S + STEP_S_MAX * 3 * rounds * arguments.block) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
        if cluster.summary()["incidents_total"]:
            raise ClusterError("a worker was lost while measuring: nothing is reported")


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run the job; returns the report, and whether both sides computed the same."""
    rounds = arguments.rounds or (5 if arguments.quick else 20)
    arguments.block = arguments.block or 4
    reporter.say(f"{rounds} rounds of 3 blocks of {arguments.block} steps of {arguments.slots} micro-batches")
    run_job(arguments, folder, rounds)
    found, cuts = read_rounds(folder)
    losses = {side: values[0] for side, values in json.loads((folder / "losses.json").read_text()).items()}
    agrees = math.isclose(losses["elastic"], losses["torch"], rel_tol=LOSS_TOLERANCE)
    if not agrees:
        reporter.say(f"the losses of the first step differ: {losses}")
    report: dict[str, Any] = {
        "stages": STAGES,
        "slots": arguments.slots,
        "rounds": rounds,
        "block_steps": arguments.block,
        "cuts": cuts,
        "first_loss": losses,
    }
    torch_s = [one["torch_s"] for one in found]
    for name, side in (("over_torch", "elastic_s"), ("torch_over_torch", "control_s")):
        report[name], report[f"{name}_ci"] = ratio([one[side] for one in found], torch_s)
    report["step_ms"] = {
        side: round(1e3 * statistics.median(one[f"{side}_s"] for one in found), 2) for side in ("elastic", "torch")
    }
    return report, agrees


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    cuts = " or ".join(map(str, report["cuts"]))
    title = f"a pipeline's step over torch's, {report['rounds']} rounds, {report['slots']} micro-batches, cut at layer {cuts}"
    table = Table("", "ratio", "95 %", "ms", title=title)
    for side, name in (("elastic", "over_torch"), ("torch", "torch_over_torch")):
        low, high = report[f"{name}_ci"]
        label = "torch (control)" if side == "torch" else side
        table.add_row(label, f"{report[name]:.3f}", f"{low:.3f} .. {high:.3f}", f"{report['step_ms'][side]:.1f}")
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="[20; with --quick 5]")
    parser.add_argument("--block", type=int, default=0, help="steps in a block [4]")
    parser.add_argument("--slots", type=int, default=8, help="micro-batches in a step")
    parser.add_argument("--batch", type=int, default=8, help="windows of 64 tokens in a micro-batch [8]")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6, help="transformer layers")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
