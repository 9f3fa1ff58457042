"""How the partial sums of a bucket reach the owners of its chunks, and how the result comes back.

Each rank owns one chunk of every bucket. It receives that chunk of every term, folds them in the terms' order,
and sends the result to everybody: the bytes of a ring all-reduce, but an order of additions that does not
depend on who computed what. Everything behind `Exchange` may be replaced for another backend. This file must
never write into a partial sum (after an abort they are what is left of the step), and must never agree on a
size by talking: both sides compute it from the same fold and layout, since gloo ends the process on a mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from elastic.flat import round_up
from elastic.folds import Fold
from elastic.group import Group, Work


@dataclass(frozen=True, eq=False)
class Lane:
    """One bucket of one step on its way.

    Attributes:
        index: the bucket's number.
        size: its elements.
        output: where the result goes, [size + some room]. Until then its memory is free to use.
        partials: for the index of each term that is computed here, its sum, [size]. Read only.
        scaled: whether the sum is divided (gradients are, extras are not).
    """

    index: int
    size: int
    output: torch.Tensor
    partials: Mapping[int, torch.Tensor]
    scaled: bool


class Exchange(Protocol):
    """The exchange of one step, for each lane in this order: `start`, `fold`, `publish`, `finish`.

    Every method may raise `CollectiveAborted`; then the group has to be drained before any memory is used.
    """

    def start(self, lane: Lane) -> None:
        """Let the partial sums go out; returns at once. Lanes are started in the order of their indices."""

    def fold(self, lane: Lane, divisor: float) -> torch.Tensor:
        """Wait for the terms, and return this rank's chunk of the sum, in `output`.

        It is divided by `divisor`, unless the lane is not scaled.
        """

    def publish(self, lane: Lane) -> None:
        """Let the chunk go out; returns at once."""

    def finish(self, lane: Lane) -> None:
        """Wait until all of `output[:size]` is there."""

    def settle(self) -> None:
        """After the last lane: wait until nothing of the step is on its way any more."""


class Alone:
    """A world of one: its only term is the sum."""

    def start(self, lane: Lane) -> None:
        pass

    def fold(self, lane: Lane, divisor: float) -> torch.Tensor:
        result = lane.output[: lane.size]
        if not lane.partials:
            result.zero_()
        for partial in lane.partials.values():
            if lane.scaled and divisor != 1.0:
                torch.div(partial, divisor, out=result)
            else:
                result.copy_(partial)
        return result

    def publish(self, lane: Lane) -> None:
        pass

    def finish(self, lane: Lane) -> None:
        pass

    def settle(self) -> None:
        pass


class OrderedExchange:
    """All-to-all of chunks, a fold by each chunk's owner, all-gather: over tagged messages.

    Tags leave the order of issue free, and a chunk that is received can wait in those chunks of the output
    whose results come later: no third buffer is needed while there are no more terms than ranks.
    """

    def __init__(self, group: Group, fold: Fold) -> None:
        self._group = group
        self._fold = fold
        self._landed: dict[int, dict[int, torch.Tensor]] = {}
        self._arriving: dict[int, list[Work]] = {}

    def start(self, lane: Lane) -> None:
        group = self._group
        mine = _chunk(lane.output, lane.size, group.rank, group.size)
        places = self._places(lane, mine.numel())
        landed: dict[int, torch.Tensor] = {}
        arriving: list[Work] = []
        for term in self._fold.terms:
            tag = self._tag(lane, 0, term.index)
            if term.owner != group.rank:
                if mine.numel():
                    landed[term.index] = next(places)
                    arriving.append(group.take(landed[term.index], term.owner, tag))
                continue
            for peer in group.peers:
                chunk = _chunk(lane.partials[term.index], lane.size, peer, group.size)
                if chunk.numel():
                    group.post(chunk, peer, tag)
        self._landed[lane.index] = landed
        self._arriving[lane.index] = arriving

    def fold(self, lane: Lane, divisor: float) -> torch.Tensor:
        group = self._group
        for work in self._arriving.pop(lane.index):
            work.wait()
        mine = _chunk(lane.output, lane.size, group.rank, group.size)
        landed = self._landed.pop(lane.index)
        if not self._fold.terms:
            mine.zero_()
        if not self._fold.terms or not mine.numel():
            return mine
        values = [
            landed[term.index]
            if term.index in landed
            else _chunk(lane.partials[term.index], lane.size, group.rank, group.size)
            for term in self._fold.terms
        ]
        first, *rest = (self._fold_group(members, values, landed) for members in self._fold.groups)
        if not rest:
            mine.copy_(first)
        for count, value in enumerate(rest):
            torch.add(mine if count else first, value, out=mine)
        if lane.scaled and divisor != 1.0:
            mine.div_(divisor)
        return mine

    def publish(self, lane: Lane) -> None:
        group = self._group
        tag = self._tag(lane, 1, 0)
        mine = _chunk(lane.output, lane.size, group.rank, group.size)
        theirs = [(peer, _chunk(lane.output, lane.size, peer, group.size)) for peer in group.peers]
        self._arriving[lane.index] = [group.take(chunk, peer, tag) for peer, chunk in theirs if chunk.numel()]
        for peer in group.peers:
            if mine.numel():
                group.post(mine, peer, tag)

    def finish(self, lane: Lane) -> None:
        for work in self._arriving.pop(lane.index):
            work.wait()

    def settle(self) -> None:
        self._group.settle()

    def _fold_group(
        self, members: tuple[int, ...], values: list[torch.Tensor], landed: Mapping[int, torch.Tensor]
    ) -> torch.Tensor:
        first, *rest = (values[index] for index in members)
        if not rest:
            return first
        # A group begins with a run of one owner, so of its first two terms at least one came from a peer: its
        # memory may take the sum. Memory of our own partials may not.
        into = first if members[0] in landed else rest[0]
        torch.add(first, rest[0], out=into)
        for value in rest[1:]:
            into.add_(value)
        return into

    def _places(self, lane: Lane, length: int) -> Iterator[torch.Tensor]:
        """Memory for terms on arrival: first the chunks of the output that are peers', then new memory."""
        step = _chunk_length(lane.size, self._group.size)
        for peer in self._group.peers:
            place = lane.output[peer * step : peer * step + length]
            if place.numel() == length:
                yield place
        while True:
            yield torch.empty(length, dtype=lane.output.dtype, device=lane.output.device)

    def _tag(self, lane: Lane, phase: int, term: int) -> int:
        return (2 * lane.index + phase) * max(len(self._fold.terms), 1) + term


def _chunk_length(size: int, ranks: int) -> int:
    return round_up(-(-size // ranks))


def _chunk(memory: torch.Tensor, size: int, rank: int, ranks: int) -> torch.Tensor:
    """The part of a bucket that `rank` folds; the last ones may be shorter, or empty."""
    step = _chunk_length(size, ranks)
    return memory[min(rank * step, size) : min((rank + 1) * step, size)]
