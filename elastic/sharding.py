"""The optimizer's state cut over the workers (ZeRO-1): each parameter is split, and each worker updates its part alone.

An elementwise optimizer does to a run of elements what it would do to them inside the whole tensor, so the bits are the
same, if the run begins and ends where the vectors of a kernel do (`BLOCK`; see `docs/decisions/0008`). The user's optimizer
stays the same object with the same groups; only inside its `step` it is shown this worker's runs in place of the
parameters. Each run is there on every worker, if only with no element, so that all know the same keys and counters.
This file never communicates: who moves state or gathers parameters is `resharding.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from elastic.errors import ConfigError
from elastic.snapshots import share_of

BLOCK = 128
"""Elements; runs begin at multiples of it. A kernel's last few elements, which fill no vector, may be rounded otherwise."""

ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.ASGD),
    *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop),
)
MARK = "elementwise"
"""An optimizer of another class says so by an attribute of this name that is True."""


class Sharding(enum.StrEnum):
    """How a tensor of an optimizer's state is shared out."""

    SPLIT = "split"
    """A run of its elements, in row-major order, for each worker."""
    WHOLE = "whole"
    """All of it for one worker: its parameter is not row-major in memory."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of what is cut: number `index` of `count`."""

    index: int = 0
    count: int = 1


def owned(sharding: Sharding | None, size: int, turn: int, cut: Cut) -> range:
    """The elements of a tensor that one worker owns; over all of them each element of one that is cut is there once.

    Args:
        sharding: how it is cut; None for not at all, so that each has all of it.
        size: number of elements. turn: of the parameter among its like, so that what is small is not all the same worker's.
    """
    if sharding is None:
        return range(size)
    position = (cut.index + turn) % cut.count
    if sharding is Sharding.WHOLE:
        return range(size if position == 0 else 0)
    blocks = share_of(-(-size // BLOCK), position, cut.count)
    return range(min(blocks.start * BLOCK, size), min(blocks.stop * BLOCK, size))


@dataclass(slots=True)
class Piece:
    """This worker's run of one parameter.

    Attributes:
        sharding, turn: how the parameter is cut; a single number is not (None), and each worker updates it.
        extent: the elements, in row-major order.
        stand_in: what the optimizer is shown, over the parameter's own memory; the key of its state.
    """

    sharding: Sharding | None
    turn: int
    extent: range
    stand_in: nn.Parameter


class OptimizerShards:
    """This worker's part of the state of all optimizers.

    Args:
        optimizers: by name.

    Attributes:
        cut: which part this worker holds. Until `recut` all of it.

    Raises:
        ConfigError: an optimizer does not treat each element by itself.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        for name, optimizer in optimizers.items():
            if type(optimizer) not in ELEMENTWISE and getattr(optimizer, MARK, False) is not True:
                raise ConfigError(
                    f"shard_optimizer=True: {name} is {type(optimizer).__name__}, which is not known to update each element "
                    f"by itself: use one such as AdamW, set {MARK} = True on an optimizer that does, or leave the option out"
                )
        self.cut = Cut()
        self._optimizers = optimizers
        self._pieces: dict[int, Piece] = {}
        # What an optimizer was born with, which is the same everywhere: whoever is cut anew before the first step needs it.
        self._born_with: dict[int, dict[str, Any]] | None = {
            id(parameter): dict(state)
            for optimizer in optimizers.values()
            for parameter, state in optimizer.state.items()
            if isinstance(parameter, Tensor)
        }
        self._lay_out()

    def piece(self, parameter: Tensor) -> Piece:
        """This worker's part of a parameter. Raises ConfigError for one that came after prepare()."""
        try:
            return self._pieces[id(parameter)]
        except KeyError:
            raise ConfigError(
                f"an optimizer has been given a parameter of shape {tuple(parameter.shape)} since prepare(), which "
                "shard_optimizer=True cannot follow: add all parameter groups before"
            ) from None

    def recut(self, cut: Cut) -> None:
        """Take another part; state that is not what the optimizers were born with must be put in its place by the caller."""
        self.cut = cut
        for optimizer in self._optimizers.values():
            for key in [key for key in optimizer.state if isinstance(key, Tensor)]:
                del optimizer.state[key]
        self._lay_out()

    @property
    def is_untouched(self) -> bool:
        """Whether no step has been made, so that each part follows from what all were born with."""
        return self._born_with is not None

    def touched(self) -> None:
        """The state is no more what the optimizers were born with."""
        self._born_with = None

    def _lay_out(self) -> None:
        for optimizer in self._optimizers.values():
            for number, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    self._pieces[id(parameter)] = piece = self._cut_out(parameter, number + index)
                    state = (self._born_with or {}).get(id(parameter))
                    if state is not None:
                        optimizer.state.pop(parameter, None)
                        optimizer.state[piece.stand_in] = {
                            key: _part_of(value, parameter, piece) for key, value in state.items()
                        }

    def _cut_out(self, parameter: nn.Parameter, turn: int) -> Piece:
        sharding = None if not parameter.dim() else Sharding.SPLIT if parameter.is_contiguous() else Sharding.WHOLE
        extent = owned(sharding, parameter.numel(), turn, self.cut)
        stand_in = nn.Parameter(view_of(parameter.detach(), sharding, extent), parameter.requires_grad)
        return Piece(sharding, turn, extent, stand_in)

    def stepping(self, optimizer: Optimizer, inner: Callable[[], object]) -> Callable[[], None]:
        """Return `inner`, the optimizer's own step, as one that updates this worker's part only."""

        def step() -> None:
            self.touched()
            whole = [group["params"] for group in optimizer.param_groups]
            try:
                for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                    group["params"] = [self._shown(parameter) for parameter in parameters]
                inner()
            finally:
                for group, parameters in zip(optimizer.param_groups, whole, strict=True):
                    for stand_in in group["params"] if group["params"] is not parameters else ():
                        stand_in.grad = None
                    group["params"] = parameters

        return step

    def _shown(self, parameter: nn.Parameter) -> nn.Parameter:
        piece = self.piece(parameter)
        stand_in = piece.stand_in
        stand_in.data = view_of(parameter.detach(), piece.sharding, piece.extent)  # wherever the memory is by now
        if parameter.grad is not None:
            stand_in.grad = view_of(parameter.grad, piece.sharding, piece.extent)
        return stand_in

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the optimizers, in order."""
        return [
            parameter
            for _, optimizer in sorted(self._optimizers.items())
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    def updated(self, parameter: Tensor, cut: Cut) -> range:
        """The bytes of a parameter, in row-major order, that the worker with this part updates and no other does."""
        piece, width = self.piece(parameter), parameter.element_size()
        extent = owned(piece.sharding, parameter.numel(), piece.turn, cut) if piece.sharding is not None else range(0)
        return range(extent.start * width, extent.stop * width)


def view_of(tensor: Tensor, sharding: Sharding | None, extent: range) -> Tensor:
    """A run of a tensor as a view: one dimension if it is split, otherwise as it is, or without elements."""
    if sharding is Sharding.SPLIT:
        return tensor.reshape(-1)[extent.start : extent.stop]
    return tensor if sharding is None or len(extent) else tensor.new_empty(0)


def _part_of(value: Any, parameter: Tensor, piece: Piece) -> Any:
    """This worker's part of one value of a parameter's state, as a tensor of its own."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
        return view_of(value, piece.sharding, piece.extent).clone(memory_format=torch.preserve_format)
    return value.clone() if isinstance(value, Tensor) else value
