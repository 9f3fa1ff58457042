"""How the partial sums of a bucket reach the owners of its chunks, and how the result comes back.

Each rank owns one chunk of every bucket. It receives that chunk of every term, folds them in the terms' order,
and sends the result to everybody: the bytes of a ring all-reduce, but an order of additions that does not
depend on who computed what. Workers of one node send tokens instead and read each other's memory. Whoever has
voted on the step has read all that it needs, so memory may change after the verdict, and not before.

Everything behind `Exchange` may be replaced for another backend. This file must never write into a partial sum
(after an abort they are what is left of the step), and must never agree on a size by talking: both sides
compute it from the same fold and layout, since gloo ends the process on a mismatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from elastic.flat import is_finite, round_up
from elastic.folds import Fold
from elastic.group import Messages, Work
from elastic.shared import TOKEN_LENGTH, Neighbours

BLOCK_NUMEL = 32 * 1024
"""Elements that are folded at a time, so that what is added, divided and looked at stays in a core's cache."""


@dataclass(frozen=True, eq=False)
class Lane:
    """One bucket of one step on its way.

    Attributes:
        index: the bucket's number.
        size: its elements.
        output: where the result goes, [size + some room]. Until then its memory is free to use.
        partials: for the index of each term that is computed here, its sum, [size]. Read only.
        scaled: whether the sum is divided (gradients are, extras are not).
        token: where neighbours read `output`.
        tokens: where neighbours read `partials`.
    """

    index: int
    size: int
    output: torch.Tensor
    partials: Mapping[int, torch.Tensor]
    scaled: bool
    token: torch.Tensor
    tokens: Mapping[int, torch.Tensor]


class Exchange(Protocol):
    """The exchange of one step, for each lane in this order: `start`, `fold`, `publish`, `finish`.

    What a lane consists of must not change before the verdict on the step. Every method may raise
    `CollectiveAborted`; then the group has to be drained before any memory is used.
    """

    def start(self, lane: Lane) -> None:
        """Let the partial sums go out; returns at once. Lanes are started in the order of their indices."""

    def fold(self, lane: Lane, divisor: float) -> bool:
        """Wait for the terms, and put this rank's chunk of the sum into `output`; returns whether it is finite.

        It is divided by `divisor`, unless the lane is not scaled.
        """

    def publish(self, lane: Lane) -> None:
        """Let the chunk go out; returns at once."""

    def finish(self, lane: Lane) -> None:
        """Wait until all of `output[:size]` is there."""


class Alone:
    """A world of one: its only term is the sum."""

    def start(self, lane: Lane) -> None:
        pass

    def fold(self, lane: Lane, divisor: float) -> bool:
        groups = tuple((index,) for index in range(len(lane.partials)))
        return _fold(groups, list(lane.partials.values()), lane.output[: lane.size], divisor if lane.scaled else 1.0)

    def publish(self, lane: Lane) -> None:
        pass

    def finish(self, lane: Lane) -> None:
        pass


class OrderedExchange:
    """All-to-all of chunks, a fold by each chunk's owner, all-gather: over tagged messages.

    Tags leave the order of issue free, and a chunk that is received can wait in those chunks of the output
    whose results come later: no third buffer is needed while there are no more terms than ranks. What a
    neighbour has is not received at all, but read where it is.
    """

    def __init__(self, group: Messages, fold: Fold, neighbours: Neighbours) -> None:
        self._group = group
        self._fold = fold
        self._neighbours = neighbours
        self._landed: dict[int, dict[int, torch.Tensor]] = {}
        self._arriving: dict[int, list[Work]] = {}

    def start(self, lane: Lane) -> None:
        group = self._group
        mine = self._chunk(lane, lane.output, group.rank)
        places = self._places(lane, mine.numel())
        landed: dict[int, torch.Tensor] = {}
        arriving: list[Work] = []
        for term in self._fold.terms:
            tag = self._tag(lane, 0, term.index)
            if term.owner != group.rank:
                if mine.numel():
                    read = self._reads(lane, term.owner)
                    landed[term.index] = _room_for_token() if read else next(places)
                    arriving.append(group.take(landed[term.index], term.owner, tag))
                continue
            for peer in group.peers:
                chunk = self._chunk(lane, lane.partials[term.index], peer)
                if chunk.numel():
                    group.post(lane.tokens[term.index] if self._reads(lane, peer) else chunk, peer, tag)
        self._landed[lane.index] = landed
        self._arriving[lane.index] = arriving

    def fold(self, lane: Lane, divisor: float) -> bool:
        group = self._group
        for work in self._arriving.pop(lane.index):
            work.wait()
        mine = self._chunk(lane, lane.output, group.rank)
        landed = self._landed.pop(lane.index)
        if not mine.numel():
            return True
        values = []
        for term in self._fold.terms:
            if term.owner == group.rank:
                values.append(self._chunk(lane, lane.partials[term.index], group.rank))
            elif self._reads(lane, term.owner):
                values.append(self._read(lane, landed[term.index], group.rank))
            else:
                values.append(landed[term.index])
        return _fold(self._fold.groups, values, mine, divisor if lane.scaled else 1.0)

    def publish(self, lane: Lane) -> None:
        group = self._group
        tag = self._tag(lane, 1, 0)
        mine = self._chunk(lane, lane.output, group.rank)
        arriving: list[Work] = []
        landed: dict[int, torch.Tensor] = {}
        for peer in group.peers:
            chunk = self._chunk(lane, lane.output, peer)
            if chunk.numel():
                landed[peer] = _room_for_token() if self._reads(lane, peer) else chunk
                arriving.append(group.take(landed[peer], peer, tag))
        for peer in group.peers:
            if mine.numel():
                group.post(lane.token if self._reads(lane, peer) else mine, peer, tag)
        self._landed[lane.index], self._arriving[lane.index] = landed, arriving

    def finish(self, lane: Lane) -> None:
        landed = self._landed.pop(lane.index)
        for peer, work in zip(landed, self._arriving.pop(lane.index), strict=True):
            work.wait()
            if self._reads(lane, peer):
                self._chunk(lane, lane.output, peer).copy_(self._read(lane, landed[peer], peer))

    def _reads(self, lane: Lane, peer: int) -> bool:
        """Whether this rank and a peer read each other's memory of a lane."""
        return peer in self._group.neighbours and bool(lane.token.numel())

    def _read(self, lane: Lane, token: torch.Tensor, rank: int) -> torch.Tensor:
        """The chunk that `rank` folds, of the bucket that a token names."""
        return self._chunk(lane, self._neighbours.read(token, lane.size, lane.output.dtype), rank)

    def _places(self, lane: Lane, length: int) -> Iterator[torch.Tensor]:
        """Memory for terms on arrival: first the chunks of the output that are peers', then new memory."""
        step = _chunk_length(lane.size, self._group.size)
        for peer in self._group.peers:
            place = lane.output[peer * step : peer * step + length]
            if place.numel() == length:
                yield place
        while True:
            yield torch.empty(length, dtype=lane.output.dtype, device=lane.output.device)

    def _chunk(self, lane: Lane, memory: torch.Tensor, rank: int) -> torch.Tensor:
        """The part of a lane that `rank` folds; the last ones may be shorter, or empty."""
        step = _chunk_length(lane.size, self._group.size)
        return memory[min(rank * step, lane.size) : min((rank + 1) * step, lane.size)]

    def _tag(self, lane: Lane, phase: int, term: int) -> int:
        return (2 * lane.index + phase) * max(len(self._fold.terms), 1) + term


def _fold(
    groups: Sequence[Sequence[int]], values: Sequence[torch.Tensor], into: torch.Tensor, divisor: float
) -> bool:
    """Put the sum of the terms' values, divided, into `into`, and return whether it is finite.

    A block at a time; the additions of each element, and so its bits, are those of `Fold.evaluate`.
    """
    if not values:
        into.zero_()
    if not into.numel() or not values:
        return True
    group_of_terms, first_group = into.new_empty(BLOCK_NUMEL), into.new_empty(BLOCK_NUMEL)
    finite = True
    for begin in range(0, into.numel(), BLOCK_NUMEL):
        end = min(begin + BLOCK_NUMEL, into.numel())
        block, length = into[begin:end], end - begin
        total: torch.Tensor | None = None
        for members in groups:
            room = (first_group if total is None else group_of_terms)[:length]
            first, *rest = (values[index][begin:end] for index in members)
            for value in rest:
                first = torch.add(first, value, out=room)
            total = first if total is None else torch.add(total, first, out=block)
        assert total is not None
        if divisor != 1.0:
            torch.div(total, divisor, out=block)
        elif total is not block:
            block.copy_(total)
        finite = finite and is_finite(block)
    return finite


def _room_for_token() -> torch.Tensor:
    return torch.empty(TOKEN_LENGTH, dtype=torch.int64)


def _chunk_length(size: int, ranks: int) -> int:
    return round_up(-(-size // ranks))

