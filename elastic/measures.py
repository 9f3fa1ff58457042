"""Numbers that every slot gives and whose mean over the step everybody knows: the loss, an accuracy, the slots' weights.

They travel as float64 in the reducer's extras and are folded in the order of the slots, so that all workers see the same
bits. Which names there are is agreed by first use: every worker must use the same ones in the same order, the vote
says whether they do, and a joiner is given the list. This file must never communicate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elastic.errors import ConfigError

NAMES_MAX = 32
EXTRAS = 1 + 2 * NAMES_MAX
"""Length of a slot's vector: its weight, then for each name value times weight, and weight."""


class Measures:
    """What the present slot has given, and the means of the newest committed step."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._means: dict[str, float] = {}
        self._weighs = False
        self._samples = 0
        self._weight: float | None = None
        self._given: dict[str, float] = {}

    @property
    def weighs(self) -> bool:
        """Whether the user says what slots weigh; otherwise it is their number of samples."""
        return self._weighs

    @property
    def agreement(self) -> object:
        """What must be equal on all workers."""
        return (self._names, self._weighs)

    def begin_slot(self, samples: int) -> None:
        """Expect the numbers of a slot with this many samples."""
        self._samples, self._weight, self._given = samples, None, {}

    def resize(self, samples: int) -> None:
        """The present slot turns out to have other samples than was expected."""
        self._samples = samples

    def weigh(self, weight: float) -> None:
        """Take the user's word for what the slot weighs. Raises ConfigError unless it is finite and not negative."""
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"session.weight({weight}) is no weight: give a finite number that is not negative")
        self._weighs, self._weight = True, weight

    def give(self, name: str, value: float) -> None:
        """Take a slot's value; NaN is as good as none. Raises ConfigError for one name too many."""
        if name not in self._names:
            if len(self._names) == NAMES_MAX:
                raise ConfigError(f"session.mean({name!r}) is one name too many: at most {NAMES_MAX} are kept")
            self._names.append(name)
        self._given[name] = value

    def of_slot(self) -> Tensor:
        """Return the slot's vector, [EXTRAS].

        Raises:
            ConfigError: other slots were weighed and this one was not.
        """
        if self._weighs and self._weight is None:
            raise ConfigError(
                "session.weight() was called in other slots and not in this one: call it in every slot, before backward()"
            )
        weight = float(self._samples) if self._weight is None else self._weight
        vector = torch.zeros(EXTRAS, dtype=torch.float64)
        vector[0] = weight
        for name, value in self._given.items():
            if not math.isnan(value):
                at = 1 + 2 * self._names.index(name)
                vector[at], vector[at + 1] = value * weight, weight
        return vector

    def commit(self, folded: Tensor) -> None:
        """Take the sum of all slots' vectors; a name that no slot has given keeps its mean."""
        values = folded.tolist()
        for name, total, weight in zip(self._names, values[1::2], values[2::2], strict=False):
            if weight:
                self._means[name] = total / weight

    @property
    def given(self) -> tuple[str, ...]:
        """Of which the present slot has given a value."""
        return tuple(self._given)

    def mean(self, name: str) -> float:
        """Return the mean over the newest committed step that had values; NaN before."""
        return self._means.get(name, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Return what a joiner needs."""
        return {"names": list(self._names), "means": dict(self._means), "weighs": self._weighs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._names, self._means = list(state["names"]), dict(state["means"])
        self._weighs = bool(state["weighs"])


def total_weight(folded: Tensor) -> float:
    """Return the weight of all slots together, as a divisor: 1 where nothing weighs anything."""
    return float(folded[0]) or 1.0
