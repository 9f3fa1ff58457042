"""An exchange in few bits: what each slot has moved goes to the owners of chunks as codes, and so does the sum to everybody.

Each slot is written in code by itself, before anything is added, and added up in float32 in the order of the slots; the sum is
written in code once, and everybody takes what that code says, its owner too. Chunks begin at whole blocks. So the bits depend
neither on who computes what nor on how many there are, and a world of one goes through the same codes. What is not gradients
(buffers, measures) is sent as it is. This file must never take a partial sum of several slots for one slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic.exchange import Alone, Exchange, Lane, OrderedExchange
from elastic.flat import is_finite
from elastic.folds import Fold
from elastic.group import Messages, Work
from elastic.quantize import BLOCK, Code, decode, encode, encoded_bytes
from elastic.shared import Neighbours

_PHASES = 2


class CodedExchange:
    """As `OrderedExchange`, for a fold whose terms are single slots.

    Args:
        group: None in a world of one.
    """

    def __init__(self, group: Messages | None, fold: Fold, code: Code, neighbours: Neighbours) -> None:
        self._group, self._fold, self._code = group, fold, code
        self._plain: Exchange = Alone() if group is None else OrderedExchange(group, fold, neighbours)
        self._arrived: dict[int, dict[int, Tensor]] = {}  # lane -> term or peer -> codes
        self._arriving: dict[int, list[Work]] = {}

    @property
    def _rank(self) -> int:
        return 0 if self._group is None else self._group.rank

    def start(self, lane: Lane) -> None:
        if not lane.scaled:
            self._plain.start(lane)
            return
        codes: dict[int, Tensor] = {}
        works: list[Work] = []
        mine = self._range(lane, self._rank)
        for term in self._fold.terms:
            tag = self._tag(lane, 0, term.index)
            if term.owner == self._rank:
                codes |= self._give(lane, term.index, tag)
            elif mine:
                assert self._group is not None
                codes[term.index] = self._room(len(mine))
                works.append(self._group.take(codes[term.index], term.owner, tag))
        self._arrived[lane.index], self._arriving[lane.index] = codes, works

    def _give(self, lane: Lane, term: int, tag: int) -> dict[int, Tensor]:
        """Send a slot's chunks to their owners; returns the codes of this rank's own."""
        own: dict[int, Tensor] = {}
        for rank in range(1 if self._group is None else self._group.size):
            chunk = self._range(lane, rank)
            if not chunk:
                continue
            data = encode(self._code, lane.partials[term][chunk.start : chunk.stop])
            if rank == self._rank:
                own[term] = data
            else:
                assert self._group is not None
                self._group.post(data, rank, tag)
        return own

    def fold(self, lane: Lane, divisor: float) -> bool:
        if not lane.scaled:
            return self._plain.fold(lane, divisor)
        for work in self._arriving.pop(lane.index):
            work.wait()
        codes = self._arrived.pop(lane.index)
        chunk = self._range(lane, self._rank)
        if not chunk:
            return True
        values = [decode(self._code, codes[term.index].to(lane.output.device), len(chunk)) for term in self._fold.terms]
        total = self._fold.evaluate(values, torch.add) if values else torch.zeros(len(chunk))
        # Everybody takes what the code says; of what is not finite only that it is so.
        data = encode(self._code, total / divisor)
        self._take(lane, self._rank, data)
        self._arrived[lane.index] = {self._rank: data}
        return is_finite(total)

    def publish(self, lane: Lane) -> None:
        if not lane.scaled:
            self._plain.publish(lane)
            return
        own = self._arrived.pop(lane.index, {})
        codes: dict[int, Tensor] = {}
        works: list[Work] = []
        for peer in () if self._group is None else self._group.peers:
            assert self._group is not None
            if self._range(lane, peer):
                codes[peer] = self._room(len(self._range(lane, peer)))
                works.append(self._group.take(codes[peer], peer, self._tag(lane, 1, 0)))
            if own:
                self._group.post(own[self._rank], peer, self._tag(lane, 1, 0))
        self._arrived[lane.index], self._arriving[lane.index] = codes, works

    def finish(self, lane: Lane) -> None:
        if not lane.scaled:
            self._plain.finish(lane)
            return
        for work in self._arriving.pop(lane.index):
            work.wait()
        for peer, data in self._arrived.pop(lane.index).items():
            self._take(lane, peer, data)

    def _take(self, lane: Lane, rank: int, data: Tensor) -> None:
        chunk = self._range(lane, rank)
        values = decode(self._code, data.to(lane.output.device), len(chunk))
        lane.output[chunk.start : chunk.stop].copy_(values)

    def _room(self, numel: int) -> Tensor:
        return torch.empty(encoded_bytes(self._code, numel), dtype=torch.uint8)

    def _range(self, lane: Lane, rank: int) -> range:
        """The elements of a lane that a rank adds up: whole blocks, but for the last."""
        size = 1 if self._group is None else self._group.size
        step = BLOCK * -(-lane.size // (BLOCK * size))
        return range(min(rank * step, lane.size), min((rank + 1) * step, lane.size))

    def _tag(self, lane: Lane, phase: int, term: int) -> int:
        return (_PHASES * lane.index + phase) * max(len(self._fold.terms), 1) + term
