"""A byte-level GPT of six blocks, an embedding and a head at its ends, which one process trains with the runtime's layers.

It has the bits that any pipeline of them has, loses layers and makes them anew by the runtime's own code: what takes a cluster
minutes is seconds here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastic.domain import Blend, LayerProfile, Plan, Stage
from elastic.group import Group
from elastic.pipeline.layers import Layers, haste, norm_of
from elastic.pipeline.travel import Travel
from examples.gpt import HEADS, VOCABULARY, Block, Windows
from examples.gpt_pipeline import Embed, Scores, loss_of
from recovery.approximation import NoBlend, blends_for
from recovery.pipelines import Model, NoLayout, Ways
from recovery.ways import swapped_ways

BLOCKS, DIM, CONTEXT, BATCH = 6, 96, 64, 8
RATE = 2e-3
HELD_OUT = 128
"""Windows at the end of the text that are for evaluation only."""
CPU = torch.device("cpu")


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
        ways: of the two halves of a batch; none: straight.
    """

    def __init__(self, seed: int, text: Windows, *, swapped: bool = False) -> None:
        torch.manual_seed(seed)
        self.layers = Layers(modules_of(), optimizer_of, None, CPU)
        self.layers.hold(range(len(self.layers)))
        self.step = 0
        self.norms: dict[int, float] = {}
        self.rebuilt: dict[int, int] = {}
        self._text = text
        self._order = torch.Generator().manual_seed(seed)
        self.ways = _swapped(self.layers) if swapped else Ways()

    def __deepcopy__(self, memo: dict[int, Any]) -> Training:
        twin = Training(0, self._text)
        for number in range(len(self.layers)):
            mine, theirs = self.layers[number], twin.layers[number]
            theirs.module.load_state_dict(mine.module.state_dict())
            assert mine.optimizer is not None and theirs.optimizer is not None
            theirs.optimizer.load_state_dict(copy.deepcopy(mine.optimizer.state_dict()))
        twin.step, twin.norms, twin.rebuilt = self.step, dict(self.norms), dict(self.rebuilt)
        twin._order.set_state(self._order.get_state())
        twin.ways = self.ways
        return twin

    def train(self, steps: int) -> None:
        """Train on so many batches."""
        for _ in range(steps):
            picked = torch.randint(0, len(self._text) - HELD_OUT, (BATCH,), generator=self._order).tolist()
            straight = tuple(range(len(self.layers)))
            ways = self.ways.of_slots or (straight,)
            size = BATCH // len(ways)
            for slot, way in enumerate(ways):
                (self._forward(picked[slot * size : (slot + 1) * size], way) / len(ways)).backward()
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

    def _forward(self, windows: list[int], way: Sequence[int] = ()) -> Tensor:
        pairs = [self._text[index] for index in windows]
        x = torch.stack([inputs for inputs, _ in pairs])
        for number in way or range(len(self.layers)):
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
        partners = self.ways.partners
        blends = blends_for(profiles, stages, {number}, self.norms, exponent, partners=partners)
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


def _swapped(layers: Layers) -> Ways:
    profiles = tuple(LayerProfile(form=layers[number].form) for number in range(len(layers)))
    ways = swapped_ways(Model(profiles, slots=2), BLOCKS)
    if isinstance(ways, NoLayout):
        raise ValueError(ways.reason)
    return ways
