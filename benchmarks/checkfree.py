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
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of
from elastic.domain import Blend, LayerProfile, Plan, Stage
from elastic.group import Group
from elastic.pipeline.layers import Layers, haste, norm_of
from elastic.pipeline.travel import Travel
from examples.gpt import HEADS, VOCABULARY, Block, Windows
from examples.gpt_pipeline import Embed, Scores, loss_of
from recovery.approximation import NoBlend, blends_for

BLOCKS, DIM, CONTEXT, BATCH = 6, 96, 64, 8
RATE = 2e-3
LATER_STEPS = (5, 20, 50)
HELD_OUT = 128
"""Windows at the end of the text that are for evaluation only."""
CPU = torch.device("cpu")
LOST = 3
"""The middle block that is lost: layer 3, the third of six."""
WAYS = ("none", "average", "uniform", "identity", "random", "copy")


def modules_of() -> list[nn.Module]:
    """Return the GPT as layers: an embedding, blocks, and the scores."""
    embed = Embed(nn.Embedding(VOCABULARY, DIM), nn.Embedding(CONTEXT, DIM))
    nn.init.normal_(embed.tokens.weight, std=0.02)
    nn.init.normal_(embed.positions.weight, std=0.02)
    scores = Scores(nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False))
    return [embed, *(Block(DIM, HEADS, 0.0) for _ in range(BLOCKS)), scores]


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a layer's optimizer."""
    return torch.optim.Adam(parameters, lr=RATE)


class Training:
    """All stages in one process.

    Attributes:
        step: the newest. norms: of each layer's newest gradient. rebuilt: layer -> the step after which it was made.
    """

    def __init__(self, seed: int, text: Windows) -> None:
        torch.manual_seed(seed)
        self.layers = Layers(modules_of(), optimizer_of, None, CPU)
        self.layers.hold(range(len(self.layers)))
        self.step = 0
        self.norms: dict[int, float] = {}
        self.rebuilt: dict[int, int] = {}
        self._text = text
        self._order = torch.Generator().manual_seed(seed)

    def __deepcopy__(self, memo: dict[int, Any]) -> Training:
        twin = Training(0, self._text)
        for number in range(len(self.layers)):
            mine, theirs = self.layers[number], twin.layers[number]
            theirs.module.load_state_dict(mine.module.state_dict())
            assert mine.optimizer is not None and theirs.optimizer is not None
            theirs.optimizer.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
        twin.step, twin.norms, twin.rebuilt = self.step, dict(self.norms), dict(self.rebuilt)
        twin._order.set_state(self._order.get_state())
        return twin

    def train(self, steps: int) -> None:
        """Train on so many batches."""
        for _ in range(steps):
            picked = torch.randint(0, len(self._text) - HELD_OUT, (BATCH,), generator=self._order).tolist()
            self._forward(picked).backward()
            self.step += 1
            for number in range(len(self.layers)):
                parameters = self.layers[number].parameters()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                self.norms[number] = norm_of(parameters)
                since = self.rebuilt.get(number)
                self.layers[number].step(1.0 if since is None else haste(self.step, since))
                self.layers[number].module.zero_grad()

    def loss(self) -> float:
        """The loss on what is never trained on."""
        with torch.no_grad():
            return float(self._forward(list(range(len(self._text) - HELD_OUT, len(self._text)))))

    def _forward(self, windows: list[int]) -> Tensor:
        pairs = [self._text[index] for index in windows]
        x = torch.stack([inputs for inputs, _ in pairs])
        for number in range(len(self.layers)):
            x = self.layers[number].module(x)
        return loss_of(x, torch.stack([targets for _, targets in pairs]))

    # -- what a lost layer becomes -------------------------------------------------------------------------------------

    def lose(self, number: int, way: str) -> None:
        """Lose a layer, and have another instead."""
        recover: Callable[[int], None] = getattr(self, f"_{way}")
        if way == "none":
            return
        recover(number)
        if way not in ("average", "uniform"):
            self.layers[number].forget_optimizer()
        self.rebuilt[number] = self.step

    def _none(self, number: int) -> None:
        return

    def _average(self, number: int, exponent: float = 1.0) -> None:
        stages = [Stage(each, each + 1, (0,)) for each in range(len(self.layers))]
        profiles = [LayerProfile(form=self.layers[each].form) for each in range(len(self.layers))]
        blends = blends_for(profiles, stages, {number}, self.norms, exponent)
        if isinstance(blends, NoBlend):
            raise ValueError(blends.reason)
        self._blend(blends)

    def _blend(self, blends: tuple[Blend, ...]) -> None:
        """As workers do it, but all in one: there is nobody to send to."""
        plan = Plan(stages=(Stage(0, len(self.layers), (0,)),))
        alone = cast(Group, SimpleNamespace(rank=0))
        Travel(self.layers).blend(alone, blends, plan, self.step)

    def _uniform(self, number: int) -> None:
        self._average(number, exponent=0.0)

    def _identity(self, number: int) -> None:
        block = cast(Block, self.layers[number].module)
        for linear in (block.out, block.down):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _random(self, number: int) -> None:
        torch.manual_seed(self.step)
        self.layers[number].module.load_state_dict(Block(DIM, HEADS, 0.0).state_dict())

    def _copy(self, number: int) -> None:
        self.layers[number].module.load_state_dict(self.layers[number - 1].module.state_dict())


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
    return {"losses": losses, "first": first.loss()}


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run all seeds; returns the report."""
    torch.set_num_threads(1)
    text = Windows(CONTEXT)
    seeds = arguments.seeds or (2 if arguments.quick else 5)
    runs = []
    for seed in range(seeds):
        runs.append(run_seed(seed, arguments.steps, text))
        none = runs[-1]["losses"]["none"][0]
        reporter.say(f"seed {seed}: loss {none:.3f} after {arguments.steps} steps")
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
    return report, True


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
    table.caption = f"a first stage made anew: {report['first_stage_jump_noswap']:+.2f}"
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="[5; with --quick 2]")
    parser.add_argument("--steps", type=int, default=1200, help="before a stage is lost [1200]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
