"""What it costs to go on with a stage that was made from its neighbours: how far the loss jumps, and how soon it is back.

    python -m benchmarks.checkfree [--quick] [--json] [--seeds N] [--steps N]

A byte-level GPT of six stages, an embedding and a head at its ends and one block in each stage, is trained past the plateau
where it knows pairs of bytes only. Then one stage is lost, and what the runtime does is done with the runtime's own code
(`recovery/approximation.py`, `elastic/pipeline/travel.py`): weights from the norms of the neighbours' newest gradients, a
fresh optimizer, a tenth more learning rate at first. Beside it, from the same moment and on the same batches:

    none       nothing is lost
    average    the runtime's: the mean of both neighbours, weighted by norms
    uniform    their plain mean
    identity   a block that adds nothing
    random     a new block
    copy       the block before

For each the loss on a fixed set of bytes that is never trained on, right after the recovery and 5, 20 and 50 steps later, less
that of `none`: `middle_stage_jump` has the first, `later` the others; medians over seeds with their order-statistic intervals.
`first_stage_jump_noswap` is that of a first block (next to the embedding) made anew: CheckFree cannot make it from one
neighbour, and the runtime refuses to. One process trains all stages, with the bits that any pipeline of them has.

`first_stage_jump_swap` is that of the first block of a model that was trained with swapped ends (--swap-ends, CheckFree+) and
became a copy of its partner, the second; `last_stage_jump_swap` the same at the other end, `middle_stage_jump_swap` a third
block averaged. All losses are of the straight way through the layers. `swap_cost` is what the swapping itself costs: the
loss with it, after as many steps, less that without.

`embedding_equal` comes from a real job of six workers (see `benchmarks.failures`): whether the embedding, which the second
stage keeps up with, had the same bits in every worker that held it, at each step before and after its stage was killed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.failures import embedding_is_kept
from benchmarks.lone_gpt import BLOCKS, CONTEXT, Training
from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of
from examples.gpt import Windows

LATER_STEPS = (5, 20, 50)
LOST = 3
"""The middle block that is lost: layer 3, the third of six."""
WAYS = ("none", "average", "uniform", "identity", "random", "copy")


def run_seed(seed: int, steps: int, text: Windows) -> dict[str, Any]:
    """Train, lose a stage, and go on in every way; returns the losses of each way, and of a first block made anew."""
    trained = Training(seed, text)
    trained.train(steps)
    losses = {}
    for way in WAYS:
        branch = copy.deepcopy(trained)
        branch.lose(LOST, way)
        found = [branch.loss()]
        for before, after in zip((0, *LATER_STEPS), LATER_STEPS, strict=False):
            branch.train(after - before)
            found.append(branch.loss())
        losses[way] = found
    first = copy.deepcopy(trained)
    first.lose(1, "random")
    swapped = Training(seed, text, swapped=True)
    swapped.train(steps)
    found = {"none": swapped.loss()}
    for name, number in (("first", 1), ("middle", LOST), ("last", BLOCKS)):
        branch = copy.deepcopy(swapped)
        branch.lose(number, "average")
        found[name] = branch.loss()
    return {"losses": losses, "first": first.loss(), "swapped": found}


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run all seeds; returns the report."""
    torch.set_num_threads(1)
    text = Windows(CONTEXT)
    seeds = arguments.seeds or (2 if arguments.quick else 5)
    runs = []
    for seed in range(seeds):
        runs.append(run_seed(seed, arguments.steps, text))
        none, swapped = runs[-1]["losses"]["none"][0], runs[-1]["swapped"]["none"]
        reporter.say(f"seed {seed}: loss {none:.3f} after {arguments.steps} steps, {swapped:.3f} with swapped ends")
    jumps = {
        way: [_interval([run["losses"][way][at] - run["losses"]["none"][at] for run in runs]) for at in range(4)]
        for way in WAYS[1:]
    }
    report = {
        "seeds": seeds,
        "steps": arguments.steps,
        "loss": round(statistics.median(run["losses"]["none"][0] for run in runs), 4),
        "middle_stage_jump": {way: found[0][0] for way, found in jumps.items()},
        "middle_stage_jump_ci": {way: found[0][1] for way, found in jumps.items()},
        "later": {
            way: {str(steps): found[at][0] for at, steps in enumerate(LATER_STEPS, 1)} for way, found in jumps.items()
        },
        "first_stage_jump_noswap": _interval([run["first"] - run["losses"]["none"][0] for run in runs])[0],
    }
    for name in ("first", "middle", "last"):
        value, interval = _interval([run["swapped"][name] - run["swapped"]["none"] for run in runs])
        report |= {f"{name}_stage_jump_swap": value, f"{name}_stage_jump_swap_ci": interval}
    report["swap_cost"] = _interval([run["swapped"]["none"] - run["losses"]["none"][0] for run in runs])[0]
    report["embedding_equal"] = embedding_is_kept(folder, reporter)
    return report, report["embedding_equal"]


def _interval(values: list[float]) -> tuple[float, list[float]]:
    return round(statistics.median(values), 4), [round(each, 4) for each in median_interval(values)]


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"nats per byte above {report['loss']:.3f}, {report['seeds']} seed(s), {report['steps']} steps"
    table = Table("a middle stage becomes", "at once", "interval", *(f"+{steps} steps" for steps in LATER_STEPS), title=title)
    for way, jump in report["middle_stage_jump"].items():
        low, high = report["middle_stage_jump_ci"][way]
        later = report["later"][way]
        table.add_row(way, f"{jump:+.4f}", f"{low:+.4f} .. {high:+.4f}", *(f"{later[str(s)]:+.4f}" for s in LATER_STEPS))
    table.caption = (
        f"a first stage made anew: {report['first_stage_jump_noswap']:+.2f}; with swapped ends, from its partner: "
        f"{report['first_stage_jump_swap']:+.4f} (last {report['last_stage_jump_swap']:+.4f}, middle "
        f"{report['middle_stage_jump_swap']:+.4f}), which cost {report['swap_cost']:+.3f} in training; the embedding is "
        + ("the same bit by bit" if report["embedding_equal"] else "NOT the same")
    )
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="[5; with --quick 2]")
    parser.add_argument("--steps", type=int, default=1200, help="before a stage is lost [1200]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
